"""A probe: an adapter from a short run, of which an allocation is made. Its folder is read, no base weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mola.allocation.base import Base
from mola.architecture.patterns import scaling_of
from mola.checkpoints.tensors import adapted_modules, read_tensors
from mola.errors import MolaError
from mola.files.reading import read_json, read_json_lines
from mola.files.schema import INTEGER, NUMBER, TEXT, check_form
from mola.insight import ROUTING_FILE
from mola.insight.usage import is_short_interval
from mola.models.adapters import check_adapter
from mola.tuner.loading import PREFIX

_USE = {"module": TEXT, "layer_index": (INTEGER, None), "mean_gates": [NUMBER]}


@dataclass(frozen=True)
class Probe:
    """The experts of a probe."""

    config: Mapping[str, Any]  # its `adapter_config.json`
    layers: Mapping[str, int]  # from module name in the base model to its decoder layer
    tensors: Mapping[str, torch.Tensor]  # as in the file, on the CPU

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A `(E, r, in)` and B `(E, r, out)` of a module."""
        key = f"{PREFIX}{module}"
        return self.tensors[f"{key}.mola_A"], self.tensors[f"{key}.mola_B"]

    def scaling(self, module: str) -> float:
        """What the update of a module is multiplied by."""
        return scaling_of(self.config, module, self.factors(module)[0].shape[1])


def read_probe(adapter: str, base: Base) -> Probe:
    """Read the probe in a folder and check that an allocation can be made of it.

    Raises:
        MolaError: no adapter of this method, made for another model, or with one expert in some module.
    """
    config = check_mixture(adapter)
    tensors = read_tensors(Path(adapter))
    modules = [key.removeprefix(PREFIX) for key in adapted_modules(tensors)]
    layers = {}
    for module in modules:
        layer = base.layer_of.get(module)
        if layer is None or layer >= base.num_layers:
            raise MolaError(
                f"`adapter` must belong to `base_model`: {adapter!r} adapts {module!r}, which is in none of the "
                f"{base.num_layers} decoder layers of {base.name!r}."
            )
        layers[module] = layer
        if len(tensors[f"{PREFIX}{module}.mola_A"]) == 1:
            raise MolaError(
                f"`adapter` must have at least 2 experts in every layer: {adapter!r} has one in layer {layer}, which "
                "says nothing about how many it needs. Use a probe with the same number everywhere."
            )
    return Probe(config, layers, tensors)


def check_mixture(adapter: str) -> dict[str, Any]:
    """The configuration of an adapter of this method.

    Raises:
        MolaError: there is none in the folder, or it is of another method.
    """
    config = check_adapter(adapter)
    if config["peft_type"] != "MOLA":
        raise MolaError(
            f"`adapter` must be a mixture of LoRA experts (MOLA): {adapter!r} is of type {config['peft_type']}. Pass a "
            "folder that `mola train` wrote."
        )
    return config


def routing_records(
    adapter: str | None,
    inspection: str | None,
    option: str = "adapter",
    advice: str = "Run `mola inspect --json FILE` on it and pass --inspection FILE.",
) -> tuple[list[dict[str, Any]], str]:
    """Use of experts by module, and what to call its source in a message.

    Args:
        adapter: run folder whose `routing.jsonl` is read, the last interval of it, unless `inspection` is given.
        inspection: file of `mola inspect --json`, of which the use over all tokens is read.
        option: what the caller calls the run folder.
        advice: what to do where that has no such file.

    Raises:
        MolaError: the file is missing, or does not hold what it should.
    """
    if inspection is None:
        path, wanted = Path(adapter or "") / ROUTING_FILE, "modules"
        if not path.is_file():
            raise MolaError(
                f"`{option}` must hold {ROUTING_FILE}, which training writes: {str(adapter)!r} has none. {advice}"
            )
    else:
        path, wanted = Path(inspection), "usage"
    try:
        content = read_json(path) if inspection is not None else _last_interval(path)
        records = content["modules"] if inspection is None else content["usage"]["all"]
        check_form(records, [_USE], str(path), "Make it again.")
        return [
            {"module": row["module"], "layer_index": row["layer_index"], "mean_gates": _gates(row)} for row in records
        ], str(path)
    except OSError as error:
        raise MolaError(f"`inspection` cannot be read: {str(path)!r} ({error.strerror or error}).") from error
    except MolaError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise MolaError(
            f"{path} must hold the use of experts under {wanted!r}, as {'training' if inspection is None else 'mola'} "
            f"writes it{'' if inspection is None else ' with `mola inspect --json`'}: it does not ({error!r})."
        ) from error


def _last_interval(path: Path) -> Any:
    """The last line, or the one before, if a run ended soon after that and the last counts less tokens than half."""
    *_, before, last = [None, None, *read_json_lines(path)]
    if last is None:
        raise ValueError("there is no whole line")
    try:
        return before if before and is_short_interval(last["modules"], before["modules"]) else last
    except (LookupError, ValueError, TypeError, ArithmeticError):  # what is wrong with the last is said by its reader
        return last


def _gates(row: Mapping[str, Any]) -> list[float]:
    gates = [float(gate) for gate in row["mean_gates"]]
    if len(gates) < 2 or not all(0 <= gate < math.inf for gate in gates) or not sum(gates) > 0:
        raise ValueError(f"mean_gates {gates}")
    return gates

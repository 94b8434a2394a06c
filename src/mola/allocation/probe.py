"""Reads a probe, the adapter of a short run from which an allocation is made; needs no weights of the base model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mola.allocation.base import Base
from mola.architecture.layer_names import PREFIX
from mola.checkpoints.adapter_folder import adapted_modules, read_tensors
from mola.errors import MolaError
from mola.files.reading import read_json, read_json_lines
from mola.insight import ROUTING_FILE, is_short_interval
from mola.models.adapters import check_adapter


@dataclass(frozen=True)
class Probe:
    """A probe adapter: its configuration and its experts."""

    config: Mapping[str, Any]  # content of the probe's `adapter_config.json`
    layers: Mapping[str, int]  # module name in the base model -> its decoder layer
    tensors: Mapping[str, torch.Tensor]  # name in the probe's file -> tensor, on the CPU


def read_probe(adapter: str, base: Base) -> Probe:
    """Read the probe in a folder and check that an allocation can be made from it.

    Raises:
        MolaError: the adapter is no mixture, belongs to a different model, or has one expert in some module.
    """
    config = check_mixture(adapter)
    tensors = read_tensors(Path(adapter))
    layers = {}
    for key in adapted_modules(tensors):
        module = key.removeprefix(PREFIX)
        layer = base.layer_of.get(module)
        if layer is None or layer >= base.num_layers:
            raise MolaError(
                f"`adapter` must belong to `base_model`: {adapter!r} adapts {module!r}, which is in none of the "
                f"{base.num_layers} decoder layers of {base.name!r}."
            )
        if len(tensors[f"{key}.mola_A"]) == 1:
            raise MolaError(
                f"`adapter` must have at least 2 experts in every layer: {adapter!r} has one in layer {layer}, which "
                "does not show how many the layer needs. Use a probe with the same number everywhere."
            )
        layers[module] = layer
    return Probe(config, layers, tensors)


def check_mixture(adapter: str) -> dict[str, Any]:
    """Read the configuration of a mixture.

    Raises:
        MolaError: the folder holds no adapter, or an adapter that is not a mixture.
    """
    config = check_adapter(adapter)
    if config["peft_type"] != "MOLA":
        raise MolaError(
            f"`adapter` must be a mixture of LoRA experts (MOLA): {adapter!r} is of type {config['peft_type']}. Pass "
            "one that `mola train` wrote with several experts."
        )
    return config


def read_routing_records(
    adapter: str | None,
    inspection: str | None,
    option: str = "adapter",
    advice: str = "Run `mola inspect --json FILE` on it and pass --inspection FILE.",
) -> tuple[list[dict[str, Any]], str]:
    """Read the mean gates of each module.

    Args:
        adapter: run folder; the last interval of its `routing.jsonl` is read unless `inspection` is given.
        inspection: file of `mola inspect --json`; its means over all tokens are read.
        option: name of the option with the run folder, used in messages.
        advice: what to do if the run folder has no `routing.jsonl`, used in messages.

    Returns:
        Records with `module`, `layer_index` and `mean_gates`, and the path of the file.

    Raises:
        MolaError: the file is missing, or does not have this form.
    """
    path = Path(adapter or "", ROUTING_FILE) if inspection is None else Path(inspection)
    if inspection is None and not path.is_file():
        raise MolaError(
            f"`{option}` must hold {ROUTING_FILE}, which training writes: {str(adapter)!r} has none. {advice}"
        )
    try:
        records = _last_interval(path)["modules"] if inspection is None else read_json(path)["usage"]["all"]
        return [
            {"module": row["module"], "layer_index": row["layer_index"], "mean_gates": _checked_gates(row)}
            for row in records
        ], str(path)
    except MolaError:
        raise
    except OSError as error:
        raise MolaError(f"`inspection` cannot be read: {str(path)!r} ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError) as error:
        writer = "training writes it" if inspection is None else "`mola inspect --json` writes it"
        raise MolaError(f"{path} must hold the mean gates of modules, as {writer}: it does not ({error!r}).") from error


def _last_interval(path: Path) -> Any:
    """The last record of `routing.jsonl`; the record before it if the run ended early in the last interval."""
    *_, before, last = [None, None, *read_json_lines(path)]
    if last is None:
        raise ValueError("there is no complete line")
    return before if before is not None and is_short_interval(last["modules"], before["modules"]) else last


def _checked_gates(row: Mapping[str, Any]) -> list[float]:
    gates = [float(gate) for gate in row["mean_gates"]]
    if len(gates) < 2 or not all(0 <= gate < math.inf for gate in gates) or not sum(gates) > 0:
        raise ValueError(f"mean_gates {gates}")
    return gates

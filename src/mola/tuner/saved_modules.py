"""Modules that an adapter trains in full (`modules_to_save`), which PEFT finds by the end of their names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mola.errors import MolaError
from mola.tuner.layer import MolaLinear

_HEADS = ("classifier", "score", "qa_outputs")  # PEFT adds them by the task, whatever the model has


def resolved(names: Sequence[str] | None, modules: Mapping[str, nn.Module], *, is_new: bool) -> list[str] | None:
    """The names as PEFT has to have them: whole ones where a part of a `MolaLinear` ends alike, as `router` does.

    Args:
        names: `modules_to_save` of a configuration.
        modules: of the model, by name.
        is_new: whether the adapter is not one that was saved, whose file says what it has trained.

    Raises:
        MolaError: a name that is at the end of no module's.
    """
    if names is None:
        return None
    own = [name for name in modules if ".mola_" not in f".{name}"]
    missing = [name for name in names if name not in _HEADS and not any(each.endswith(name) for each in own)]
    if missing and is_new:
        last = sorted({name.rpartition(".")[2] for name in own if name and not name.rpartition(".")[2].isdigit()})
        raise MolaError(
            f"`modules_to_save` must all exist in the model, these do not: {', '.join(missing)}. Modules of this "
            f"model: {', '.join(last)}."
        )
    found: list[str] = []
    for name in names:
        is_ours = any(part.endswith(name) for part in MolaLinear.adapter_layer_names)
        found += [each for each in own if each.endswith(name) and not _wrapper_of(each, modules)] if is_ours else [name]
    return found


def check_not_inside(adapted: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """Refuse linears inside of what another adapter trains in full: PEFT saves neither then.

    Raises:
        MolaError: one of the names `adapted` is such a linear's.
    """
    for name in adapted:
        if wrapper := _wrapper_of(name, modules):
            raise MolaError(
                f"`target_modules` matches {name!r}, which lies in {wrapper!r}: another adapter trains that in full "
                "(`modules_to_save`), and neither could be saved. Leave it out with `exclude_modules`."
            )


def tie(model: Any, configs: Iterable[Any], tied_weight_keys: Collection[str]) -> None:
    """For `ensure_weight_tying`: the embeddings are trained, and what is tied to them is tied again."""
    embedding = model.get_input_embeddings()
    source = next(name for name, module in model.named_modules() if module is embedding)
    for config in configs:
        saved = config.modules_to_save
        tied = [name for name in saved if any(f".{key}".endswith(f".{name}") for key in tied_weight_keys)]
        config.modules_to_save = [*(name for name in saved if name not in tied), source]
        config.modules_to_tie = set(tied_weight_keys)


def _wrapper_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The module around this one that an adapter trains in full; None if there is none."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((each for each in above if isinstance(modules.get(each), AuxiliaryTrainingWrapper)), None)

"""Modules that an adapter trains in full (`modules_to_save`), which PEFT finds by the end of their names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.layer import MolaLinear

# PEFT adds these heads depending on the task, whether or not the model has them.
_HEADS_OF_PEFT = ("classifier", "score", "qa_outputs")
_HEADS_OF_TASKS: dict[Any, tuple[str, ...]] = {
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Heads of sequence classifiers that PEFT does not know.
_OTHER_HEADS = ("classification_head", "logits_proj")


def add_task_heads(model: nn.Module, config: MolaConfig, *, is_new: bool) -> None:
    """Add the heads of a task, which start with random values, to the `modules_to_save` of a configuration.

    PEFT adds heads too, but to the configuration that the user passed, and `MolaModel` uses a copy.
    A saved adapter (`is_new` is False) already has the heads of sequence classifiers.
    """
    heads = _HEADS_OF_TASKS.get(config.task_type, ())
    if config.task_type == "SEQ_CLS" and is_new:
        heads = tuple(name for name in _OTHER_HEADS if hasattr(model, name))
    missing = [name for name in heads if name not in (config.modules_to_save or ())]
    if missing:
        config.modules_to_save = [*(config.modules_to_save or ()), *missing]


def resolve_modules_to_save(
    names: Sequence[str] | None, modules: Mapping[str, nn.Module], *, is_new: bool
) -> list[str] | None:
    """`modules_to_save` for one model: names that would also match a part of a `MolaLinear` become whole names.

    For `router`, as an example, PEFT would also match `mola_router`.

    Raises:
        MolaError: a name of a new adapter matches no module, which PEFT would ignore.
    """
    if names is None:
        return None
    own = [name for name in modules if ".mola_" not in f".{name}"]
    missing = [name for name in names if name not in _HEADS_OF_PEFT and not any(each.endswith(name) for each in own)]
    if missing and is_new:
        last_parts = {name.rpartition(".")[2] for name in own}
        known = ", ".join(sorted(part for part in last_parts if part and not part.isdigit()))
        raise MolaError(
            f"`modules_to_save` must all exist in the model, these do not: {', '.join(missing)}. Modules of this "
            f"model: {known}."
        )
    found: list[str] = []
    for name in names:
        is_ambiguous = any(part.endswith(name) for part in MolaLinear.adapter_layer_names)
        whole_names = [each for each in own if each.endswith(name) and not trained_in_full(each, modules)]
        found += whole_names if is_ambiguous else [name]
    return found


def trained_in_full(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the module around `name` that an adapter trains in full; None if there is no such module."""
    parts = name.split(".")
    parents = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((each for each in parents if isinstance(modules.get(each), AuxiliaryTrainingWrapper)), None)


def tie_saved_embeddings(model: Any, configs: Iterable[Any], tied_weight_keys: Collection[str]) -> None:
    """For `ensure_weight_tying`: train the input embeddings in full, and tie the modules that share their weight.

    The function changes `configs`. `tied_weight_keys` are the names of the tied modules, from PEFT.
    """
    embedding = model.get_input_embeddings()
    source = next(name for name, module in model.named_modules() if module is embedding)
    for config in configs:
        untied = [n for n in config.modules_to_save if not any(f".{key}".endswith(f".{n}") for key in tied_weight_keys)]
        config.modules_to_save = [*untied, source]
        config.modules_to_tie = set(tied_weight_keys)

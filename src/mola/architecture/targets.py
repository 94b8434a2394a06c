"""Which linears and which parameters of a model are adapted.

- `default_target_modules`: which linears to adapt if the user names none.
- `check_target_modules`: check that every name matches a linear.
- `resolve_target_modules`: the names for one model, from the default, "all-linear" or the user's names.
- `linear_shapes`: sizes of the targeted linears, also of a model without weights (meta device).
- `find_stacks`: sizes of the `target_parameters`, each of which holds a base model's own experts in one tensor.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from mola.architecture.allocation import LinearShape, StackShape
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.linears import (
    base_layer_of,
    is_adaptable,
    is_read_without_call,
    linear_sizes,
    original_modules,
)
from mola.errors import MolaError

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Other models fuse several of these into one linear (Phi-3), or split one into several (DeepSeek's attention).
_LLAMA_VARIANTS = ("qkv_proj", "gate_up_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")

Targets = list[str] | set[str] | str

_ALL_LINEAR = "all-linear"
_HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs", "classification_head", "logits_proj", "lm_head")
_NOT_LINEAR_NAME = re.compile(r"norm|ln_|embed|dropout|act|rotary|wte|wpe|^\d+$", re.IGNORECASE)
_PARAMETER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def default_target_modules(
    module_names: Iterable[str], model_type: str | None, not_linears: Collection[str] = ()
) -> list[str]:
    """Names of the linears to adapt when the user gives none.

    These are the names in `LLAMA_LINEARS` that exist in the model, and their fused or split variants. A model that has
    none of them gets PEFT's choice for LoRA and its `model_type`.

    Args:
        module_names: names of the model's modules.
        model_type: `config.model_type` of the model.
        not_linears: names of modules that cannot be adapted. If such a module and a linear have the same name, the name
            is left out, because a name in `target_modules` stands for all modules of that name.

    Raises:
        MolaError: there is no default for this architecture.
    """
    names = list(module_names)
    leaves = {_last_part(name) for name in names} - {_last_part(name) for name in not_linears}
    found = [name for name in (*LLAMA_LINEARS, *_LLAMA_VARIANTS) if name in leaves]
    if found:
        return found
    choice = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type or "", [])
    found = [name for name in names if matches(name, choice)] if isinstance(choice, str) else []
    found = found or [name for name in choice if name in leaves]
    if found:
        return found
    parents = {name.rpartition(".")[0] for name in names}
    candidates = {_last_part(name) for name in names if name and name not in parents}
    candidates = {name for name in candidates if not _NOT_LINEAR_NAME.search(name)}
    raise MolaError(
        f"`target_modules` must be given for this architecture, there is no default for model type "
        f"{model_type!r}. Name the linears to adapt; this model has: {', '.join(sorted(candidates)) or 'none'}."
    )


def check_target_modules(model: nn.Module, target_modules: Targets, exclude_modules: Targets | None = None) -> None:
    """Check that every name in `target_modules` matches a module, and only linears.

    A name matches, as in PEFT, a module of that name and every module whose name ends with "." + name. A string is a
    regular expression for whole names. "all-linear" is every linear except the head.

    Args:
        model: the model to be adapted, or a model that a different PEFT method has already adapted.
        target_modules: list or set of names, a regular expression, or "all-linear".
        exclude_modules: names or a regular expression of modules that are not adapted.

    Raises:
        MolaError: a name or the expression matches nothing, or a module that is not a linear.
    """
    for field, value in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        if isinstance(value, str):
            _check_expression(field, value)
    modules = dict(original_modules(model))
    targeted = _targeted(model, target_modules, exclude_modules)
    if _is_all_linear(target_modules):
        if not targeted:
            raise MolaError(f"`target_modules` 'all-linear' finds no linear in this {type(model).__name__}.")
        return
    _check_all_match(model, modules, target_modules)
    if not targeted:
        raise MolaError(
            f"`exclude_modules` must leave something to adapt: {_as_text(exclude_modules)} excludes everything "
            f"that `target_modules` {_as_text(target_modules)} matches."
        )
    for name, module in targeted:
        if not is_adaptable(module):
            raise MolaError(
                f"`target_modules` must match linears only: {_as_text(target_modules)} matches {name!r} "
                f"({type(base_layer_of(module)).__name__}). Linears of this model: "
                f"{', '.join(_linear_names(modules))}."
            )
        if is_read_without_call(model, name):
            raise MolaError(
                f"`target_modules` must not match {name!r}: this model reads its weight in a kernel and does not call "
                "it, so experts on it would have no effect. Leave it out."
            )


def linear_shapes(
    model: nn.Module, target_modules: Targets, exclude_modules: Targets | None = None
) -> list[LinearShape]:
    """Sizes of the targeted linears, in the order of `named_modules()`. The model may be on the meta device.

    Arguments and errors are those of `check_target_modules`.
    """
    check_target_modules(model, target_modules, exclude_modules)
    stacks = LayerStacks.of(model)
    return [
        LinearShape(name, stacks.index(name), *linear_sizes(module))
        for name, module in _targeted(model, target_modules, exclude_modules)
    ]


def resolve_target_modules(
    model: nn.Module, stacks: LayerStacks, target_modules: Targets | None, exclude_modules: Targets | None = None
) -> tuple[Targets, Targets | None]:
    """`target_modules` and `exclude_modules` for one model: None (the default) and "all-linear" become names.

    The default leaves out towers for images or sound.

    Args:
        model: the model to be adapted.
        stacks: the layers of the model.
        target_modules: as in `MolaConfig`.
        exclude_modules: as in `MolaConfig`.

    Raises:
        MolaError: for the reasons of `default_target_modules` and `check_target_modules`.
    """
    if target_modules is None:
        within = tuple(f"{part}." for part in stacks.parts) or ""
        inside = [(name, module) for name, module in original_modules(model) if name.startswith(within)]
        not_linears = [name for name, module in inside if not is_adaptable(module) or is_read_without_call(model, name)]
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        target_modules = set(default_target_modules([name for name, _ in inside], model_type, not_linears))
        return target_modules, stacks.also_excluding_towers(exclude_modules)
    check_target_modules(model, target_modules, exclude_modules)
    if _is_all_linear(target_modules):
        target_modules = {name for name, _ in _targeted(model, target_modules, exclude_modules)}
    return target_modules, exclude_modules


def matches(name: str, targets: Targets) -> bool:
    """Whether a name is in `targets` or ends with "." + one of them; a string is a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


# ---------------------------------------------------------------------- parameters


def is_transposed(module: nn.Module, weight: torch.Tensor) -> bool:
    """Whether a module stacks its experts' weights as `(count, in, out)`; False for `(count, out, in)`."""
    return weight.dim() == 3 and bool(getattr(module, "is_transposed", False))


def find_stacks(
    model: nn.Module, target_parameters: list[str], is_target: Callable[[str], Any] | None = None
) -> list[StackShape]:
    """The parameters that `target_parameters` names, in the order of the model.

    Args:
        model: the model; its weights are not read, so it may be on the meta device.
        target_parameters: names. A name matches a parameter of that name, and every one that ends with "." + name.
        is_target: replaces `matches`: whether the parameter with this whole name is adapted.

    Raises:
        MolaError: a name matches nothing, a parameter that is not plain, floating-point and of 2 or 3 dimensions, or a
            parameter that the model reads without calling its module.
    """
    layers = LayerStacks.of(model)
    found: list[StackShape] = []
    known: dict[str, None] = {}
    for module_name, module in original_modules(model):
        base = base_layer_of(module)
        for parameter, weight in base.named_parameters(recurse=False):
            name = f"{module_name}.{parameter}"
            if weight.dim() == 3 and not isinstance(base, nn.Conv1d):
                known[".".join(name.split(".")[-2:])] = None
            if not (matches(name, target_parameters) if is_target is None else is_target(name)):
                continue
            # Mixers read the weights of short convolutions.
            if is_read_without_call(model, module_name) or isinstance(base, nn.Conv1d):
                raise MolaError(
                    f"`target_parameters` must not name {name!r}: this model reads it and does not call its "
                    "module, so a LoRA on it would have no effect. Leave it out."
                )
            if weight.dim() not in (2, 3) or type(weight) is not nn.Parameter or weight.dtype not in _PARAMETER_DTYPES:
                raise MolaError(
                    "`target_parameters` must name plain floating-point parameters with 2 or 3 dimensions: "
                    f"{name!r} has shape {tuple(weight.shape)} and {weight.dtype}. Load the base model without "
                    "quantisation, or leave it out."
                )
            count, first, second = (1, *weight.shape)[-3:]
            inner, outer = (first, second) if is_transposed(base, weight) else (second, first)
            found.append(StackShape(module_name, parameter, layers.index(name), count, inner, outer))
    missing = [target for target in target_parameters if not any(matches(stack.name, [target]) for stack in found)]
    if missing:
        raise MolaError(
            f"`target_parameters` must all exist in the model, and not be left out by other fields: these do not: "
            f"{', '.join(map(repr, missing))}. Stacked experts of this model: {', '.join(known) or 'none'}."
        )
    return found


# ---------------------------------------------------------------------- helpers


def _targeted(model: nn.Module, targets: Targets, excluded: Targets | None) -> list[tuple[str, nn.Module]]:
    modules = [(n, m) for n, m in original_modules(model) if not (excluded and matches(n, excluded))]
    if not _is_all_linear(targets):
        return [(name, module) for name, module in modules if matches(name, targets)]
    heads = _head_modules(model)
    linears = [(n, m) for n, m in modules if is_adaptable(m) and not is_read_without_call(model, n)]
    return [(name, module) for name, module in linears if not any(module is head for head in heads)]


def _head_modules(model: nn.Module) -> list[nn.Module]:
    """Modules of the heads of a Transformers model, classifiers included; none for other models."""
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is None:
        return []
    heads = [get_head(), *(getattr(model, name, None) for name in _HEADS)]
    return [module for head in heads if isinstance(head, nn.Module) for module in head.modules()]


def _is_all_linear(targets: Targets) -> bool:
    return isinstance(targets, str) and targets.lower() == _ALL_LINEAR


def _check_expression(field: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise MolaError(
            f"`{field}` as one string must be a regular expression, got {value!r} ({error}). For names pass a list."
        ) from error


def _check_all_match(model: nn.Module, modules: Mapping[str, nn.Module], targets: Targets) -> None:
    """Raise MolaError if a name or the expression matches no module; the message lists the model's linears."""
    linears = _linear_names(modules)
    listed = f"Linears of this model: {', '.join(linears) or 'none'}."
    if isinstance(targets, str):
        if not any(matches(name, targets) for name in modules):
            raise MolaError(
                f"`target_modules` as one string is a regular expression over whole module names: {targets!r} "
                f"matches nothing. For module names pass a list. {listed}"
            )
        return
    if not targets:
        raise MolaError("`target_modules` must name at least one module, got an empty list.")
    missing = sorted(target for target in targets if not any(matches(name, [target]) for name in modules))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and any(matches(name, [target]) for target in missing):
            raise MolaError(
                f"`target_modules` must match linears only: {name!r} holds the weights of all {len(parameter)} experts "
                "of a mixture-of-experts base model in one parameter. `target_parameters` gives each expert one LoRA."
            )
    if missing:
        close = {name: difflib.get_close_matches(name, linears, n=1) for name in missing}
        described = [f"{name!r} (did you mean {close[name][0]!r}?)" if close[name] else repr(name) for name in missing]
        raise MolaError(f"`target_modules` must all exist in the model, these do not: {', '.join(described)}. {listed}")


def _linear_names(modules: Mapping[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(_last_part(name) for name, module in modules.items() if is_adaptable(module)))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _as_text(targets: Targets | None) -> str:
    return repr(targets if isinstance(targets, str) or targets is None else sorted(targets))

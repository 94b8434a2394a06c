"""Which linears of a model are adapted.

- `default_target_modules`, `check_target_modules`: what to adapt, with every name accounted for.
- `resolve_target_modules`: both, and "all-linear", for one model.
- `linear_shapes`: sizes of the targeted linears, also of a model without weights (meta device).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from peft.utils.constants import SEQ_CLS_HEAD_NAMES, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from mola.architecture.allocation import LinearShape
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.linears import adaptable, base_layer_of, original_modules, sizes_of
from mola.architecture.read_weights import is_read, is_read_in
from mola.errors import MolaError

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Where these are one linear, as in Phi-3, or several, as in DeepSeek's attention, they have other names.
_FUSED_LINEARS = ("qkv_proj", "gate_up_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")

Targets = list[str] | set[str] | str

_ALL_LINEAR = "all-linear"
_HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs", "classification_head", "logits_proj", "lm_head")
_NOT_LINEAR_NAME = re.compile(r"norm|ln_|embed|dropout|act|rotary|wte|wpe|^\d+$", re.IGNORECASE)


def default_target_modules(
    module_names: Iterable[str], model_type: str | None, not_linears: Collection[str] = ()
) -> list[str]:
    """Names to adapt when the user gave none.

    Those of `LLAMA_LINEARS` that exist in the model, also where query, key and value or gate and up are one
    linear; if none does, PEFT's LoRA choice for `model_type`.

    Args:
        module_names: names of the model's modules.
        model_type: `config.model_type` of the model.
        not_linears: names that stand for something else there, or for what is read and not called.

    Returns:
        Names as `target_modules` takes them.

    Raises:
        MolaError: the architecture is unknown; the names it has are listed.
    """
    names = list(module_names)
    # Not where a module of that name is none to adapt: names stand for all of them.
    leaves = {_leaf(name) for name in names} - {_leaf(name) for name in not_linears}
    found = [name for name in (*LLAMA_LINEARS, *_FUSED_LINEARS) if name in leaves]
    if found:
        return found
    choice = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type or "", [])
    found = [name for name in names if matches(name, choice)] if isinstance(choice, str) else []
    found = found or [name for name in choice if name in leaves]
    if found:
        return found
    parents = {name.rpartition(".")[0] for name in names}
    candidates = sorted({_leaf(name) for name in names if name and name not in parents})
    candidates = [n for n in candidates if not (_NOT_LINEAR_NAME.search(n) or is_read_in(model_type, n))]
    raise MolaError(
        f"`target_modules` must be given for this architecture, there is no default for model type "
        f"{model_type!r}. Name the linears to adapt; this model has: {', '.join(candidates) or 'none'}."
    )


def check_target_modules(model: nn.Module, target_modules: Targets, exclude_modules: Targets | None = None) -> None:
    """Check that every name in `target_modules` matches something, and only linears.

    A name matches a module of that name and every module whose name ends with "." + name, as in PEFT; a
    string is a regular expression over the whole name; "all-linear" is every linear except the head.

    Args:
        model: the model to be adapted, or already adapted by another PEFT method.
        target_modules: list or set of names, a regular expression, or "all-linear".
        exclude_modules: names or a regular expression of modules to leave alone.

    Raises:
        MolaError: a name or the expression matches nothing, or something that is not a linear; the linears
            of this model and close spellings are named.
    """
    _check_patterns(target_modules=target_modules, exclude_modules=exclude_modules)
    modules = dict(original_modules(model))
    if _is_all_linear(target_modules):
        targeted = _select(model, target_modules, exclude_modules)
        if not targeted:
            raise MolaError(f"`target_modules` 'all-linear' finds no linear in this {type(model).__name__}.")
        return
    if isinstance(target_modules, str):
        if not any(matches(name, target_modules) for name in modules):
            raise MolaError(_nothing_matches([target_modules], modules, is_pattern=True))
    else:
        if not target_modules:
            raise MolaError("`target_modules` must name at least one module, got an empty list.")
        missing = [target for target in target_modules if not any(matches(name, [target]) for name in modules)]
        _refuse_fused_experts(model, missing)
        if missing:
            raise MolaError(_nothing_matches(sorted(missing), modules, is_pattern=False))
    targeted = _select(model, target_modules, exclude_modules)
    if not targeted:
        raise MolaError(
            f"`exclude_modules` must leave something to adapt: {_shown(exclude_modules)} excludes everything "
            f"that `target_modules` {_shown(target_modules)} matches."
        )
    for name, module in targeted:
        if not adaptable(module):
            raise MolaError(
                f"`target_modules` must match linears only: {_shown(target_modules)} matches {name!r} "
                f"({type(base_layer_of(module)).__name__}). Linears of this model: "
                f"{', '.join(_linear_names(modules))}; or, from Python, use `exclude_modules`."
            )
        if is_read(model, name):
            raise MolaError(
                f"`target_modules` must not match {name!r}: this model reads its weight in a kernel and does not call "
                "it, so that experts there would do nothing. Leave it out; or, from Python, use `exclude_modules`."
            )


def linear_shapes(
    model: nn.Module, target_modules: Targets, exclude_modules: Targets | None = None
) -> list[LinearShape]:
    """Sizes of the targeted linears, in the order of `named_modules()`.

    Args:
        model: the model; weights are not read, so it may be on the meta device.
        target_modules: list or set of names, a regular expression, or "all-linear".
        exclude_modules: names or a regular expression of modules to leave alone.

    Returns:
        One entry per targeted linear. `Conv1D` keeps its weight as `(in, out)`, which is taken care of.

    Raises:
        MolaError: as `check_target_modules`.
    """
    check_target_modules(model, target_modules, exclude_modules)
    stacks = LayerStacks.of(model)
    return [
        LinearShape(name, stacks.index(name), *sizes_of(module))
        for name, module in _select(model, target_modules, exclude_modules)
    ]


def resolve_target_modules(
    model: nn.Module, stacks: LayerStacks, target_modules: Targets | None, exclude_modules: Targets | None = None
) -> tuple[Targets, Targets | None]:
    """`target_modules` and `exclude_modules` for one model: the default and "all-linear" become names.

    The default leaves out what is beside a language model: towers for images or sound.

    Args:
        model: the model to be adapted.
        stacks: its layers.
        target_modules: as in the configuration, None for the default.
        exclude_modules: as in the configuration.

    Raises:
        MolaError: as `default_target_modules` and `check_target_modules`.
    """
    if target_modules is None:
        within = tuple(f"{part}." for part in stacks.parts) or ""
        inside = [(name, module) for name, module in original_modules(model) if name.startswith(within)]
        no_linears = [name for name, module in inside if not adaptable(module) or is_read(model, name)]
        target_modules = set(default_target_modules([name for name, _ in inside], _model_type(model), no_linears))
        return target_modules, stacks.also_excluding_towers(exclude_modules)
    check_target_modules(model, target_modules, exclude_modules)
    if _is_all_linear(target_modules):
        target_modules = {name for name, _ in _select(model, target_modules, exclude_modules)}
    return target_modules, exclude_modules


def _refuse_fused_experts(model: nn.Module, missing: list[str]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and any(matches(name, [target]) for target in missing):
            raise MolaError(
                f"`target_modules` must match linears only: {name!r} holds the weights of all {len(parameter)} experts "
                "of a mixture-of-experts base model in one parameter. `target_parameters` gives each of them one "
                "LoRA. The linears are in its attention and its shared experts."
            )


def _select(model: nn.Module, targets: Targets, excluded: Targets | None) -> list[tuple[str, nn.Module]]:
    modules = [(n, m) for n, m in original_modules(model) if not (excluded and matches(n, excluded))]
    if not _is_all_linear(targets):
        return [(name, module) for name, module in modules if matches(name, targets)]
    heads = _heads(model)
    linears = [(name, module) for name, module in modules if adaptable(module) and not is_read(model, name)]
    return [(name, module) for name, module in linears if not any(module is head for head in heads)]


def _heads(model: nn.Module) -> list[nn.Module]:
    """Modules of the head of a Transformers model, the classifiers' included; none for other models."""
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is None:
        return []
    heads = [get_head(), *(getattr(model, name, None) for name in _HEADS)]
    return [module for head in heads if isinstance(head, nn.Module) for module in head.modules()]


def _is_all_linear(targets: Targets) -> bool:
    return isinstance(targets, str) and targets.lower() == _ALL_LINEAR


def matches(name: str, targets: Targets) -> bool:
    """Whether a name is one of `targets` or ends with "." and one, or as a whole matches a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _check_patterns(**fields: Targets | None) -> None:
    for field, value in fields.items():
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise MolaError(
                    f"`{field}` as one string must be a regular expression, got {value!r} ({error}). "
                    "For module names pass a list."
                ) from error


def _nothing_matches(missing: list[str], modules: Mapping[str, nn.Module], is_pattern: bool) -> str:
    linears = _linear_names(modules)
    listed = f"Linears of this model: {', '.join(linears) or 'none'}."
    if is_pattern:
        hint = f"For a module name pass a list: [{missing[0]!r}]. " if missing[0].isidentifier() else ""
        return (
            f"`target_modules` as one string is a regular expression over whole module names: {missing[0]!r} "
            f"matches nothing. {hint}{listed}"
        )
    described = []
    for name in missing:
        close = difflib.get_close_matches(name, linears, n=1)
        described.append(repr(name) + (f" (did you mean {close[0]!r}?)" if close else ""))
    return f"`target_modules` must all exist in the model, these do not: {', '.join(described)}. {listed}"


def _linear_names(modules: Mapping[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(_leaf(name) for name, module in modules.items() if adaptable(module)))


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _shown(targets: Targets | None) -> str:
    return repr(targets if isinstance(targets, str) or targets is None else sorted(targets))

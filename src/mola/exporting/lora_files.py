"""PEFT's LoRA folders: written from factors, and read with the rank and scale of every module as PEFT resolves them."""

from __future__ import annotations

import copy
import math
import shlex
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mola.checkpoints.formats import foreign_format
from mola.checkpoints.tensors import read_settings, read_tensors
from mola.errors import MolaError
from mola.files.digests import WEIGHTS_FILE
from mola.models.lora_fit import check_shape, put_into
from mola.tuner import MolaConfig
from mola.tuner.loading import PREFIX

# What a mixture and a LoRA have in common besides the adapted linears.
_KEPT = ("task_type", "modules_to_save", "trainable_token_indices", "layer_replication", "ensure_weight_tying")
_REFUSED = {
    "use_dora": "DoRA scales the base weight",
    "lora_bias": "experts have no bias",
    "target_parameters": "only linears have experts",
    "modules_to_save": "a module trained in full cannot be shared out to experts",
    "trainable_token_indices": "tokens trained in full cannot be shared out to experts",
    "layer_replication": "its layers are not those of the base model",
    "alora_invocation_tokens": "it works on a part of the tokens",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
        "it computes more than `B A x`",
    ),
}
# Other starts than these change the base weight, which other experts need as it was.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class Factors(NamedTuple):
    """The update `scaling * B A` of one module by one LoRA.

    Attributes:
        A: `(r, in)`.
        B: `(out, r)`.
        scaling: as PEFT computes it.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def write_lora(
    folder: Path,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    rank: int,
    config: MolaConfig,
    base: nn.Module,
    others: Mapping[str, torch.Tensor],
    stacked_ranks: Mapping[str, int],
) -> None:
    """Write a LoRA whose scale is 1 everywhere.

    Args:
        folder: where to.
        updates: module, as in a PeftModel -> `B (out, r)` and `A (r, in)`. Below `rank` they are filled up with zeros,
            which more programs read than ranks by module; above it the module has its own.
        rank: the rank of most modules.
        config: of the mixture, for what is kept.
        base: the adapted model, for names and kinds of its linears.
        others: tensors besides experts, such as those of `modules_to_save` and of stacked experts.
        stacked_ranks: ranks of the stacked experts, by name of their parameter.
    """
    tensors, own_ranks = dict(others), {}
    for module, (B, A) in updates.items():
        missing = max(rank - A.shape[0], 0)
        parts = {"A": nn.functional.pad(A, (0, 0, 0, missing)), "B": nn.functional.pad(B, (0, missing))}
        for part, value in parts.items():
            tensors[f"{module}.lora_{part}.weight"] = value.float().contiguous()
        if A.shape[0] > rank:
            own_ranks[module.removeprefix(PREFIX)] = A.shape[0]
    own_ranks |= {name: r for name, r in stacked_ranks.items() if r > rank}
    lora = lora_config(updates, rank, config, base, stacked_ranks, own_ranks)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))


def lora_config(
    modules: Collection[str],
    rank: int,
    config: MolaConfig,
    base: nn.Module,
    stacked_ranks: Mapping[str, int],
    own_ranks: Mapping[str, int] | None = None,
) -> LoraConfig:
    """The configuration of a LoRA of these modules; arguments as `write_lora`, and ranks above `rank` by module."""
    known = dict(base.named_modules())
    kept = {name: value for name in _KEPT if (value := getattr(config, name))}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets([name.removeprefix(PREFIX) for name in modules], base),
        target_parameters=list(stacked_ranks) or None,
        rank_pattern=dict(own_ranks or {}),
        alpha_pattern=dict(own_ranks or {}),
        fan_in_fan_out=any(isinstance(known[name].get_base_layer(), Conv1D) for name in modules),
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
        **kept,
    )


def check_loads(lora: LoraConfig, modules: Collection[str], base_on_meta: nn.Module) -> None:
    """Whether PEFT puts a LoRA where its tensors are: of some architectures it takes names for those of older models.

    Args:
        lora: its configuration; stays as it is.
        modules: that have tensors, named as in a PeftModel.
        base_on_meta: the base model without weights; the LoRA is put into it.

    Raises:
        MolaError: it does not, and would leave the tensors out without a word.
    """
    asked = copy.deepcopy(lora)
    asked.base_model_name_or_path = None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, for those who load the file
        try:
            adapted = get_peft_model(base_on_meta, asked)
        except ValueError as error:  # of names that it would have to take for a part of the stacked experts
            raise MolaError(
                f"`source` adapts linears that a LoRA of this architecture cannot have in this version of PEFT: {error}"
            ) from error
    found = {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    if lost := sorted(set(modules) - found):
        raise MolaError(
            f"`source` adapts linears that a LoRA of this architecture cannot have in this version of PEFT: it puts "
            f"those of {lost[0].removeprefix(PREFIX)!r} and {len(lost) - 1} others elsewhere when it loads the file. "
            "Train with `exclude_modules` or other `target_modules` to export it, such as those of attention."
        )


def targets(names: list[str], base: nn.Module) -> list[str]:
    """Last parts of the names, unless a module that is not adapted has one of them."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    every = [name.removeprefix(PREFIX) for name, _ in base.named_modules() if name.rpartition(".")[2] in leaves]
    return leaves if len(every) == len(names) else sorted(names)


def read_lora(folder: Path, model_on_meta: nn.Module) -> dict[str, Factors]:
    """Read a LoRA of PEFT.

    Args:
        folder: of the adapter.
        model_on_meta: its base model, without weights; the LoRA is put into it.

    Returns:
        By name of the module in the base model.

    Raises:
        MolaError: another kind of adapter, one that does what experts cannot, or one that does not fit the model.
    """
    settings = read_settings(folder)
    is_foreign = foreign_format(settings) is not None
    if settings.get("peft_type") != "LORA" or is_foreign:
        is_ours = settings.get("peft_type") == "MOLA" and not is_foreign
        advice = f" `mola convert {shlex.quote(str(folder))} --to lora ...` makes one of it." if is_ours else ""
        raise MolaError(
            f"`source` must be LoRA adapters of PEFT for --from lora: {str(folder)!r} has peft_type "
            f"{settings.get('peft_type')!r}{', of another program' if is_foreign else ''}.{advice}"
        )
    refused = {name: why for name, why in _REFUSED.items() if settings.get(name)}
    if settings.get("bias", "none") != "none":
        refused["bias"] = "trained biases are the base model's"
    if settings.get("init_lora_weights", True) not in _STARTS:
        refused["init_lora_weights"] = f"{settings['init_lora_weights']!r} changes the base weight"
    for name, why in refused.items():
        raise MolaError(f"`{name}` of {str(folder)!r} cannot be expressed by experts: {why}. Train it without.")
    tensors = read_tensors(folder)
    layers = lora_layers(model_on_meta, folder)
    found = {
        name: Factors(*_factors(tensors, name, layer, folder), scaling=layer.scaling["default"])
        for name, layer in layers.items()
    }
    for name, layer in layers.items():  # PEFT saves the frozen head or embeddings beside what is trained of them
        key, expected = f"{PREFIX}{name}.base_layer.weight", tuple(layer.get_base_layer().weight.shape)
        if key in tensors:
            check_shape(tensors.pop(key), expected, key, folder)
    if tensors:
        raise MolaError(f"{str(folder)!r} has a tensor that belongs to no adapted linear: {next(iter(tensors))!r}.")
    return found


def lora_layers(model_on_meta: nn.Module, folder: Path) -> dict[str, Any]:
    """The layers of a LoRA by module, with ranks and scales resolved.

    Raises:
        MolaError: its configuration is wrong, or does not fit the model.
    """
    model = put_into(model_on_meta, folder)
    layers: dict[str, Any] = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    odd = [
        name for name, layer in layers.items() if not len(layer.lora_A) or not math.isfinite(layer.scaling["default"])
    ]
    if odd:
        raise MolaError(f"`source` must adapt linears with a finite scale: {str(folder)!r} does not in {odd[0]!r}.")
    return layers


def _factors(
    tensors: dict[str, torch.Tensor], name: str, layer: Any, folder: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a module, taken out of `tensors`."""
    found = []
    for part, weights in (("A", layer.lora_A), ("B", layer.lora_B)):
        key, expected = f"{PREFIX}{name}.lora_{part}.weight", tuple(weights["default"].weight.shape)
        found.append(check_shape(tensors.pop(key, None), expected, key, folder).float())
    return found[0], found[1]

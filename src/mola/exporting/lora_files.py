"""Writes and reads PEFT's LoRA folders; PEFT itself determines the rank and scale of every module."""

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

from mola.checkpoints.adapter_folder import foreign_format, read_settings, read_tensors
from mola.errors import MolaError
from mola.exporting.mixtures import NAME
from mola.files.digests import WEIGHTS_FILE
from mola.models.adapters import check_shape, put_lora_into
from mola.tuner import MolaConfig
from mola.tuner.loading import PREFIX
from mola.tuner.stacked import StackedParameters

# Settings that a mixture and a LoRA share, besides the adapted linears.
_SHARED_SETTINGS = ("task_type", "modules_to_save", "trainable_token_indices", "ensure_weight_tying")
_NOT_EXPRESSIBLE = {
    "use_dora": "DoRA scales the base weight",
    "lora_bias": "experts have no bias",
    "target_parameters": "only linears can have experts",
    "modules_to_save": "a module trained in full cannot be divided among experts",
    "trainable_token_indices": "tokens trained in full cannot be divided among experts",
    "layer_replication": "its layers are not the base model's layers",
    "alora_invocation_tokens": "it acts on some of the tokens only",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
        "it computes more than `B A x`",
    ),
}
# Other initialisations change the base weight, which the other experts need unchanged.
_KEEP_BASE_WEIGHT = (True, False, "gaussian", "orthogonal", "eva")


class Factors(NamedTuple):
    """The update `scaling * B A` of one module by one LoRA.

    Attributes:
        A: `(r, in)`.
        B: `(out, r)`.
        scaling: the factor of the update, as computed by PEFT.
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
    other_tensors: Mapping[str, torch.Tensor],
    stacked_ranks: Mapping[str, int],
) -> None:
    """Write a LoRA whose scale is 1 everywhere.

    Args:
        folder: the folder to write to.
        updates: name of the module in a PeftModel -> `B (out, r)` and `A (r, in)`. A module of a lower rank than `rank`
            is filled up with zeros, since more programs read one rank than a rank per module. A module of a higher
            rank keeps its rank.
        rank: the rank of most modules.
        config: the mixture's configuration, for the settings that are kept.
        base: the adapted model, which has the names and classes of the linears.
        other_tensors: tensors that are not the experts of linears: `modules_to_save` and LoRAs of stacked experts.
        stacked_ranks: name of a parameter with stacked experts -> the rank of their LoRAs.
    """
    tensors, own_ranks = dict(other_tensors), {}
    for module, (B, A) in updates.items():
        missing = max(rank - A.shape[0], 0)
        parts = {"A": nn.functional.pad(A, (0, 0, 0, missing)), "B": nn.functional.pad(B, (0, missing))}
        for part, value in parts.items():
            tensors[f"{module}.lora_{part}.weight"] = value.float().contiguous()
        if A.shape[0] > rank:
            own_ranks[module.removeprefix(PREFIX)] = A.shape[0]
    own_ranks |= {name: r for name, r in stacked_ranks.items() if r > rank}
    lora = make_lora_config(updates, rank, config, base, stacked_ranks, own_ranks)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))


def make_lora_config(
    modules: Collection[str],
    rank: int,
    config: MolaConfig,
    base: nn.Module,
    stacked_ranks: Mapping[str, int],
    own_ranks: Mapping[str, int] | None = None,
) -> LoraConfig:
    """The configuration of a LoRA on these modules; `own_ranks` holds the ranks that differ from `rank`."""
    known = dict(base.named_modules())
    shared = {name: value for name in _SHARED_SETTINGS if (value := getattr(config, name, None))}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=choose_target_names([name.removeprefix(PREFIX) for name in modules], base),
        target_parameters=list(stacked_ranks) or None,
        rank_pattern=dict(own_ranks or {}),
        alpha_pattern=dict(own_ranks or {}),
        fan_in_fan_out=any(isinstance(known[name].get_base_layer(), Conv1D) for name in modules),
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
        **shared,
    )


def choose_target_names(names: list[str], base: nn.Module) -> list[str]:
    """Values for `target_modules`: last parts of the names, or whole names if other modules share the last parts."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    matching = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in leaves]
    return leaves if len(matching) == len(names) else sorted(names)


def check_peft_places_lora(lora: LoraConfig, modules: Collection[str], meta_base: nn.Module) -> None:
    """Check that PEFT puts a LoRA into the modules for which it has tensors.

    For some architectures PEFT mistakes names of linears for names used by older models, and would silently leave
    their tensors out. The LoRA is put into `meta_base`, the base model without weights.

    Raises:
        MolaError: PEFT puts the LoRA into different modules.
    """
    config = copy.deepcopy(lora)
    config.base_model_name_or_path = None
    reason = "`source` adapts linears that a LoRA of this architecture cannot have in this version of PEFT"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(meta_base, config)
        except ValueError as error:  # PEFT mistook a name for part of stacked experts
            raise MolaError(f"{reason}: {error}") from error
    found = {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    if missing := sorted(set(modules) - found):
        raise MolaError(
            f"{reason}: PEFT would put the LoRA tensors of {missing[0].removeprefix(PREFIX)!r} elsewhere, which is one "
            f"of {len(missing)} such linears. To export the adapter, train with `exclude_modules` or different "
            "`target_modules`, such as the linears of attention."
        )


def stacked_lora_tensors(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], rank: int
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The LoRAs of a base model's stacked experts, as saved by PEFT for `target_parameters`; the conversion is exact.

    Args:
        model: the adapted model, which may be on the meta device.
        tensors: the content of the mixture's file.
        rank: the LoRAs' lowest rank; A and B of a lower rank are filled up with zeros.

    Returns:
        PEFT's name -> tensor, and name of the parameter -> rank. The LoRAs' scale is 1: `B` includes the mixture's
        scale.
    """
    found, ranks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, StackedParameters):
            settings = module.settings[NAME]
            ordered = [each for each, _ in module.base_layer.named_parameters(recurse=False) if each in settings]
            # PEFT wraps the module once for each parameter; the wrapper of the first parameter is innermost.
            for depth, parameter in enumerate(reversed(ordered)):
                A, B = (tensors[f"{name}.mola_{part}_{parameter}"].float() for part in "AB")
                ranks[f"{name.removeprefix(PREFIX)}.{parameter}"] = max(rank, A.shape[1])
                padding = (0, 0, 0, max(rank - A.shape[1], 0))
                A, B = nn.functional.pad(A, padding), nn.functional.pad(B, padding) * settings[parameter].scaling
                wrapper = name + ".base_layer" * depth
                found[f"{wrapper}.lora_A.weight"] = A.flatten(0, 1).contiguous()
                found[f"{wrapper}.lora_B.weight"] = B.permute(2, 1, 0).flatten(1).contiguous()
    return found, ranks


def read_lora(folder: Path, model_on_meta: nn.Module) -> dict[str, Factors]:
    """Read a LoRA of PEFT, and put it into `model_on_meta`, its base model without weights.

    Returns:
        Name of the module in the base model -> the module's factors.

    Raises:
        MolaError: the adapter is of a different kind, does something that experts cannot, or does not fit the model.
    """
    _check_expressible(folder)
    tensors = read_tensors(folder)
    model = put_lora_into(model_on_meta, folder)
    layers: dict[str, Any] = {
        name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    found = {}
    for name, layer in layers.items():
        if not len(layer.lora_A) or not math.isfinite(layer.scaling["default"]):
            raise MolaError(f"`source` must adapt linears with a finite scale: {str(folder)!r} does not in {name!r}.")
        A, B = (
            check_shape(tensors.pop(key, None), tuple(weights["default"].weight.shape), key, folder).float()
            for key, weights in (
                (f"{PREFIX}{name}.lora_A.weight", layer.lora_A),
                (f"{PREFIX}{name}.lora_B.weight", layer.lora_B),
            )
        )
        found[name] = Factors(A, B, layer.scaling["default"])
        # PEFT also saves the frozen weight of an adapted head or of adapted embeddings.
        frozen_key = f"{PREFIX}{name}.base_layer.weight"
        if frozen_key in tensors:
            check_shape(tensors.pop(frozen_key), tuple(layer.get_base_layer().weight.shape), frozen_key, folder)
    if tensors:
        raise MolaError(f"{str(folder)!r} has a tensor that belongs to no adapted linear: {next(iter(tensors))!r}.")
    return found


def _check_expressible(folder: Path) -> None:
    settings = read_settings(folder)
    is_foreign = foreign_format(settings) is not None
    if settings.get("peft_type") != "LORA" or is_foreign:
        is_mola = settings.get("peft_type") == "MOLA" and not is_foreign
        advice = f" `mola convert {shlex.quote(str(folder))} --to lora ...` makes a LoRA of it." if is_mola else ""
        raise MolaError(
            f"`source` must be LoRA adapters of PEFT for --from lora: {str(folder)!r} has peft_type "
            f"{settings.get('peft_type')!r}{', of a different program' if is_foreign else ''}.{advice}"
        )
    reasons = {name: why for name, why in _NOT_EXPRESSIBLE.items() if settings.get(name)}
    if settings.get("bias", "none") != "none":
        reasons["bias"] = "trained biases belong to the base model"
    if settings.get("init_lora_weights", True) not in _KEEP_BASE_WEIGHT:
        reasons["init_lora_weights"] = f"{settings['init_lora_weights']!r} changes the base weight"
    for name, why in reasons.items():
        raise MolaError(
            f"`{name}` of {str(folder)!r} cannot be expressed by experts: {why}. Train the LoRA without this setting."
        )

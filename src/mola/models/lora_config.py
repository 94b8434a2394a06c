"""The plain LoRA in place of a mixture with one expert everywhere: its configuration and its first values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from dataclasses import replace
from statistics import mode
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from mola.architecture.layer_names import PREFIX
from mola.errors import MolaError
from mola.tuner import MolaConfig
from mola.tuner.layer import ExpertSettings, MolaLinear
from mola.tuner.stacked import StackedParameters

# Settings that a mixture and a LoRA share, besides those of linears.
_SHARED_SETTINGS = ("task_type", "modules_to_save", "trainable_token_indices", "ensure_weight_tying")


def lora_like(mixture: MolaConfig, model_on_meta: nn.Module) -> LoraConfig:
    """The configuration of the LoRA that adapts what a mixture with one expert everywhere adapts, in the same way.

    Args:
        mixture: the mixture's configuration, which stays unchanged.
        model_on_meta: the base model without weights; the LoRA is put into it.

    Raises:
        MolaError: the mixture does not fit the model, or PEFT puts the LoRA elsewhere.
    """
    alone = replace(mixture, base_model_name_or_path=None, modules_to_save=None, trainable_token_indices=None)
    with torch.device("meta"):
        adapted: Any = get_peft_model(model_on_meta, alone)
    resolved = adapted.peft_config["default"]
    linears: dict[str, ExpertSettings] = {}
    stacks: dict[str, ExpertSettings] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, MolaLinear):
            linears[name.removeprefix(PREFIX)] = module.settings["default"]
        elif isinstance(module, StackedParameters):
            stacks |= {f"{name.removeprefix(PREFIX)}.{part}": each for part, each in module.settings["default"].items()}
    has_conv1d = any(isinstance(each, Conv1D) for each in adapted.modules())
    model = adapted.unload()
    r, settings = mode(resolved.r if isinstance(resolved.r, list) else [resolved.r]), {**linears, **stacks}
    targets, excluded = resolved.target_modules, resolved.exclude_modules
    if resolved.layers_to_transform is None:
        targets, excluded = choose_target_names([*linears], model), None
    start: Any = mixture.init_lora_weights
    lora = LoraConfig(
        r=r,
        lora_alpha=mixture.lora_alpha,  # type: ignore[arg-type] # PEFT takes numbers that are not whole, too
        lora_dropout=mixture.lora_dropout,
        use_rslora=mixture.use_rslora,
        rank_pattern={name: each.r for name, each in settings.items() if each.r != r},
        alpha_pattern={n: each.lora_alpha for n, each in settings.items() if each.lora_alpha != mixture.lora_alpha},
        target_modules=targets,
        exclude_modules=excluded,
        target_parameters=[*stacks] or None,
        layers_to_transform=resolved.layers_to_transform,
        layers_pattern=resolved.layers_pattern,
        fan_in_fan_out=has_conv1d,
        init_lora_weights=True if start == "principal" else start,  # PEFT does not know it
        **{name: value for name in _SHARED_SETTINGS if (value := getattr(mixture, name, None))},
    )
    _check_placed(lora, [PREFIX + name for name in linears], model)
    return lora


def choose_target_names(names: list[str], base: nn.Module) -> list[str]:
    """Values for `target_modules`: last parts of the names, or whole names if other modules share the last parts."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    matching = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in leaves]
    return leaves if len(matching) == len(names) else sorted(names)


@torch.no_grad()
def draw_like_one_expert(model: PeftModel, method: bool | str) -> None:
    """Give a new LoRA the values with which a mixture with one expert everywhere starts.

    `method` is an `init_lora_weights` of `MolaConfig`.
    """
    name = model.active_adapter
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            settings = ExpertSettings(layer.r[name], 1, 1, layer.lora_alpha[name], init_lora_weights=method)
            one = MolaLinear(layer.get_base_layer(), name, settings)
            factors: Any = layer.lora_A[name], layer.lora_B[name]
            factors[0].weight.copy_(one.mola_A[name][0])
            factors[1].weight.copy_(one.mola_B[name][0].t())


def _check_placed(lora: LoraConfig, modules: Collection[str], model_on_meta: nn.Module) -> None:
    """Check that PEFT puts a LoRA into these modules.

    For some architectures PEFT mistakes names of linears for names used by older models, and would silently leave
    their tensors out.
    """
    config = copy.deepcopy(lora)
    config.base_model_name_or_path = None
    reason = "`target_modules` has linears that a LoRA of this architecture cannot have in this version of PEFT"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model_on_meta, config)
        except ValueError as error:  # PEFT mistook a name for part of stacked experts
            raise MolaError(f"{reason}: {error}") from error
    found = {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    if missing := sorted(set(modules) - found):
        raise MolaError(
            f"{reason}: {len(missing)} of them, such as {missing[0].removeprefix(PREFIX)!r}. Train "
            "with other linears, such as those of attention."
        )

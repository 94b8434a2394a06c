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


def lora_like(mixture: MolaConfig, model_on_meta: nn.Module) -> LoraConfig:
    """The configuration of the LoRA with the linears, ranks and scales of a new mixture that has one expert everywhere.

    Args:
        mixture: the mixture's configuration, which stays unchanged.
        model_on_meta: the base model without weights; the LoRA is put into it.

    Raises:
        MolaError: the mixture does not fit the model, or PEFT puts the LoRA elsewhere.
    """
    with torch.device("meta"):
        adapted: Any = get_peft_model(model_on_meta, replace(mixture, modules_to_save=None))
    resolved, linears = adapted.peft_config["default"], {}
    for name, module in adapted.named_modules():
        if isinstance(module, MolaLinear):
            linears[name.removeprefix(PREFIX)] = module
    settings = {name: module.settings["default"] for name, module in linears.items()}
    r, lora_alpha = (mode(getattr(each, field) for each in settings.values()) for field in ("r", "lora_alpha"))
    start: Any = mixture.init_lora_weights
    lora = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=mixture.lora_dropout,
        use_rslora=mixture.use_rslora,
        rank_pattern={name: each.r for name, each in settings.items() if each.r != r},
        alpha_pattern={name: each.lora_alpha for name, each in settings.items() if each.lora_alpha != lora_alpha},
        target_modules=resolved.target_modules,
        exclude_modules=resolved.exclude_modules,
        layers_to_transform=resolved.layers_to_transform,
        layers_pattern=resolved.layers_pattern,
        modules_to_save=mixture.modules_to_save,
        fan_in_fan_out=any(isinstance(module.get_base_layer(), Conv1D) for module in linears.values()),
        init_lora_weights=True if start == "principal" else start,  # PEFT does not know it
        task_type=mixture.task_type,
    )
    check_peft_places_lora(lora, [PREFIX + name for name in linears], adapted.unload())
    return lora


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


def check_peft_places_lora(lora: LoraConfig, modules: Collection[str], model_on_meta: nn.Module) -> None:
    """Check that PEFT puts a LoRA into the modules for which it has tensors.

    For some architectures PEFT mistakes names of linears for names used by older models, and would silently leave
    their tensors out.

    Args:
        lora: the LoRA's configuration.
        modules: names of the modules in a PeftModel.
        model_on_meta: the base model without weights; the LoRA is put into it.

    Raises:
        MolaError: PEFT puts the LoRA into different modules.
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

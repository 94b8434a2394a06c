"""Checks before the first module of a model is replaced, so that a refused adapter leaves the model unchanged."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features, check_target_module_exists
from torch import nn

from mola.architecture.allocation import StackShape
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.linears import base_layer_of, is_adaptable
from mola.architecture.patterns import check_matches
from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.initialization import can_unpack_weight, check_shapes
from mola.tuner.layer import MolaLinear
from mola.tuner.per_layer import PerLayer
from mola.tuner.saved_modules import trained_in_full
from mola.tuner.stacked import StackedParameters

# Modules that hold adapters: in a module's name, the adapter's own name comes after one of these parts.
_HOLDERS = re.compile(r"(?:^|\.)(?:base_layer|original_module|modules_to_save|token_adapter|mola_\w+)(?:\.|$)")
_RESERVED_NAMES = ("base_model", "model", "mola_A", "mola_B", "mola_router")


def check_adapter_names(adapter_names: Iterable[str], model: nn.Module) -> None:
    """Refuse adapters with the name of a module, or of a part of a module's path.

    PEFT finds an adapter's tensors by the adapter's name among the parts of their names. If a module has the same name,
    PEFT leaves tensors out of the saved file, including those of other adapters.
    """
    parts = {*_RESERVED_NAMES}
    for name, _ in model.named_modules():
        parts.update(_HOLDERS.split(name, maxsplit=1)[0].split("."))
    for adapter_name in parts.intersection(adapter_names):
        raise MolaError(
            f"An adapter cannot be called {adapter_name!r}, which is part of the name of a module: saving would leave "
            "out tensors, including those of other adapters. Choose a different name."
        )


def check_base_model(config: MolaConfig, model: nn.Module) -> None:
    """Refuse base models of a different type than the adapter's, and those that rescale their weights."""
    model_config = getattr(model, "config", None)
    model_type = getattr(model_config, "model_type", None)
    if None not in (config.base_model_type, model_type) and config.base_model_type != model_type:
        raise MolaError(
            f"`base_model` must be the kind of model that the adapter was trained on: it is of type {model_type!r}, "
            f"`base_model_type` in adapter_config.json is {config.base_model_type!r}. Pass the adapter's own base "
            "model; if this model has the same weights in a different form, remove `base_model_type`."
        )
    if model_type == "rwkv" and getattr(model_config, "rescale_every", 0):
        raise MolaError(
            "an RWKV divides its weights by powers of two in evaluation, which would give experts too much weight: set "
            "`rescale_every` to 0 in the configuration of the base model before you load it."
        )


def check_injection(
    config: MolaConfig,
    modules: Mapping[str, nn.Module],
    adapted: Sequence[str],
    per_layer: PerLayer,
    layer_stacks: LayerStacks,
    stacked_parameters: Sequence[StackShape],
    *,
    is_new: bool,
) -> None:
    """Refuse a configuration that does not fit the model.

    `adapted` has the names of the linears that get mixtures, and `stacked_parameters` the parameters that get LoRAs.
    `is_new` is False for a saved adapter.
    """
    for name in adapted:
        settings = per_layer.settings(config, name, layer_stacks.index(name))
        if wrapper := trained_in_full(name, modules):
            raise MolaError(
                f"`target_modules` matches {name!r}, which lies in {wrapper!r}: a different adapter trains that module "
                "in full (`modules_to_save`), and neither adapter could be saved. Use `exclude_modules`."
            )
        if is_adaptable(modules[name]):
            _check_has_weights(name, modules[name], "weight")
            _check_base_layer(name, base_layer_of(modules[name]), config, is_new=is_new)
            features: Any = _get_in_out_features(base_layer_of(modules[name]))
            check_shapes(config.init_lora_weights, settings.num_experts, settings.r, features, name)
    for stack in stacked_parameters:
        settings = per_layer.settings(config, stack.name, stack.layer_index)
        _check_has_weights(stack.module, modules[stack.module], stack.parameter)
        check_shapes(config.init_lora_weights, 1, settings.r, (stack.in_features, stack.out_features), stack.name)
    check_matches(config.num_experts_pattern, adapted, "num_experts_pattern")
    for field in ("rank_pattern", "alpha_pattern"):
        check_matches(getattr(config, field), [*adapted, *(stack.name for stack in stacked_parameters)], field)
    if is_new and config.layers_to_transform is not None:
        _check_layers_exist(config, modules)
    _check_no_linear_in_stack(adapted, [stack.module for stack in stacked_parameters], modules)


def _check_has_weights(name: str, module: nn.Module, parameter: str) -> None:
    """Raise MolaError for offloaded weights: accelerate restores them for called modules only, not for experts."""
    weight: Any = getattr(base_layer_of(module), parameter, None)
    if weight is not None and weight.is_meta and hasattr(module, "_hf_hook"):
        raise MolaError(
            f"the base model must not be offloaded: the weights of {name!r} come from the CPU or a disk when it is "
            "called, which does not work for experts. Load the model without `device_map`, or with a map that fits "
            "into the devices' memory."
        )


def _check_base_layer(name: str, base: Any, config: MolaConfig, *, is_new: bool) -> None:
    # Under tensor parallelism each process has only some features, and a router needs all of them.
    mesh = getattr(getattr(base, "weight", None), "device_mesh", None)
    mesh_names = (mesh.mesh_dim_names if mesh is not None else None) or ()
    if getattr(base, "_hf_tp_plan", None) is not None or "tp" in mesh_names:
        raise MolaError(
            f"the base model must not be tensor-parallel: the weight of {name!r} is split over processes, and "
            "experts are not. Load it without `tp_plan`; FSDP2 shards both."
        )
    if config.init_lora_weights == "principal" and is_new and not can_unpack_weight(base):
        raise MolaError(
            f"`init_lora_weights` 'principal' needs the base's weights: those of {name!r}, a {type(base).__name__}, "
            "cannot be unpacked. Choose a different initialisation."
        )


def _check_layers_exist(config: MolaConfig, modules: Mapping[str, nn.Module]) -> None:
    """Raise MolaError for a number in `layers_to_transform` that no layer has; PEFT would ignore it."""
    layers, probe = config.layers_to_transform, copy.copy(config)
    probe.target_modules, probe.exclude_modules = {"inside"}, None  # the name of an invented linear in each layer
    names = [f"{name}.inside" for name in modules if name.rpartition(".")[2].isdigit()]
    for number in [layers] if isinstance(layers, int) else layers or []:
        probe.layers_to_transform = [number]
        if not any(check_target_module_exists(probe, name) for name in names):
            raise MolaError(
                f"`layers_to_transform` must be numbers of layers of the model (from 0): there is no layer {number}. "
                "Correct it."
            )


def _check_no_linear_in_stack(adapted: Sequence[str], stacked: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    linears = {*adapted, *(name for name, module in modules.items() if isinstance(module, MolaLinear))}
    stacks = {*stacked, *(name for name, module in modules.items() if isinstance(module, StackedParameters))}
    if both := sorted(linears & stacks):
        raise MolaError(
            f"`target_modules` and `target_parameters` must not name the same linear, not even in different adapters "
            f"of a model: {both[0]!r}. Leave it out of one of them, with `exclude_modules` for instance."
        )

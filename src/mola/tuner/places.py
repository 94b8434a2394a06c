"""Whether an adapter can be put where its configuration says, before the first module is replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features, check_target_module_exists
from torch import nn

from mola.architecture.allocation import StackShape
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.linears import base_layer_of, is_adaptable
from mola.architecture.patterns import check_matches
from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.initialization import can_be_read, check_shapes
from mola.tuner.layer import MolaLinear
from mola.tuner.per_layer import PerLayer
from mola.tuner.stacked import StackedParameters


def check_places(
    config: MolaConfig,
    modules: Mapping[str, nn.Module],
    adapted: Sequence[str],
    per_layer: PerLayer,
    layer_stacks: LayerStacks,
    stacked_parameters: Sequence[StackShape],
    is_new: bool = True,
) -> None:
    """Refuse a configuration that does not fit the model, which is then left as it was.

    Args:
        config: of the adapter.
        modules: of the model, by name.
        adapted: names of those that get mixtures.
        per_layer: its numbers.
        layer_stacks: the model's layers.
        stacked_parameters: those that get LoRAs.
        is_new: whether its values are drawn; those of a saved adapter are in its file.

    Raises:
        MolaError: a shape, a pattern or a place does not fit.
    """
    for name in adapted:
        settings = per_layer.settings(config, name, layer_stacks.index(name))
        if is_adaptable(modules[name]):
            _check_not_offloaded(name, modules[name])
            _check_not_parallel(name, modules[name])
            if config.init_lora_weights == "principal" and is_new:
                _check_readable(name, modules[name])
            features: Any = _get_in_out_features(base_layer_of(modules[name]))
            check_shapes(config.init_lora_weights, settings.num_experts, settings.r, features, name)
    if is_new and config.layers_to_transform is not None:
        _check_layers(config, modules)
    check_matches(config.num_experts_pattern, adapted, "num_experts_pattern")
    stacks = [stack.name for stack in stacked_parameters]
    for stack in stacked_parameters:
        _check_not_offloaded(stack.module, modules[stack.module], stack.parameter)
        settings = per_layer.settings(config, stack.name, stack.layer_index)
        check_shapes(config.init_lora_weights, 1, settings.r, (stack.in_features, stack.out_features), stack.name)
    for field in ("rank_pattern", "alpha_pattern"):
        check_matches(getattr(config, field), [*adapted, *stacks], field)
    linears = {*adapted, *(name for name, module in modules.items() if isinstance(module, MolaLinear))}
    stacked = {name for name, module in modules.items() if isinstance(module, StackedParameters)}
    both = sorted(linears & {*stacked, *(stack.module for stack in stacked_parameters)})
    if both:
        raise MolaError(
            f"`target_modules` and `target_parameters` must not name the same linear, in all adapters of a model: "
            f"{both[0]!r}. Leave it out of one of them, with `exclude_modules` for instance."
        )


def _check_layers(config: MolaConfig, modules: Mapping[str, nn.Module]) -> None:
    """PEFT passes over the number of a layer that is not there."""
    layers, inside = config.layers_to_transform, copy.copy(config)
    inside.target_modules, inside.exclude_modules = {"inside"}, None  # of whatever has a number for a name
    places = [f"{name}.inside" for name in modules if name.rpartition(".")[2].isdigit()]
    for number in [layers] if isinstance(layers, int) else layers or []:
        inside.layers_to_transform = [number]
        if not any(check_target_module_exists(inside, place) for place in places):
            raise MolaError(
                f"`layers_to_transform` must be layers that the model has, the lowest is 0: there is no {number}. "
                "Correct it."
            )


def _check_not_parallel(name: str, module: nn.Module) -> None:
    """A tensor-parallel linear sees and gives a part of its features, and adds up what its processes have."""
    base: Any = base_layer_of(module)
    mesh = getattr(getattr(base, "weight", None), "device_mesh", None)
    names = None if mesh is None else mesh.mesh_dim_names
    if getattr(base, "_hf_tp_plan", None) is not None or "tp" in (names or ()):
        raise MolaError(
            f"the base model must not be tensor-parallel: the weight of {name!r} is shared out over processes, and "
            "experts are not. Load it without `tp_plan`; FSDP2 shards both."
        )


def _check_readable(name: str, module: nn.Module) -> None:
    """The start "principal" reads the base's weight, which PEFT unpacks for some ways to quantise it."""
    base = base_layer_of(module)
    if not can_be_read(base):
        raise MolaError(
            f"`init_lora_weights` 'principal' needs the base's weights: those of {name!r}, a {type(base).__name__}, "
            "cannot be unpacked. Take another start."
        )


def _check_not_offloaded(name: str, module: nn.Module, parameter: str = "weight") -> None:
    """A hook of accelerate brings the weights of a module that is called, and experts lie in none."""
    weight: Any = getattr(base_layer_of(module), parameter, None)
    if weight is not None and weight.is_meta and hasattr(module, "_hf_hook"):
        raise MolaError(
            f"the base model must not be offloaded: the weights of {name!r} come from the CPU or a disk when it is "
            "called, and experts cannot. Load it without `device_map`, or with one for which there is room."
        )

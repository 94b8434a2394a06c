"""`layer_replication`: a model's layers repeated, with shared weights and experts of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import replicate_layers
from peft.utils.integrations import skip_init_on_device
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.tuner.layer import MolaLinear

# Of configurations, with an entry for each layer, which models read in every pass.
_LISTS = {"layer_types", "mlp_layer_types", "layers_block_type", "layer_rope_theta"}


@contextmanager
def replicated_layers(model: nn.Module, ranges: list[tuple[int, int]] | None) -> Iterator[None]:
    """Repeat ranges of layers, if there are any; the model is as it was if the block raises."""
    if not ranges:
        yield
        return
    lists = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    lists = [each for each in lists if isinstance(each[2], nn.ModuleList)]
    before = layer_settings(model)
    _replicate_layers(model, ranges)
    repeated = [module for module, name, layers in lists if getattr(module, name) is not layers]
    for config, values in before:
        if any(getattr(module, "config", None) is config for module in repeated):
            _repeat_lists(config, values, ranges)
    try:
        yield
    except BaseException:
        for module, name, layers in lists:
            setattr(module, name, layers)
        restore(before)
        raise


def layer_settings(model: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """Configurations of the model and its parts, with the number of layers that each has now and lists by layer."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    configs = [each for each in found.values() if hasattr(each, "num_hidden_layers")]
    return [
        (each, {"num_hidden_layers": each.num_hidden_layers} | {key: vars(each)[key] for key in _LISTS & {*vars(each)}})
        for each in configs
    ]


def has_lists(model: nn.Module) -> bool:
    """Whether a model's configuration has lists by layer, which PEFT does not repeat with the layers."""
    found = (values[key] for _, values in layer_settings(model) for key in _LISTS & values.keys())
    return any(isinstance(each, (list, tuple)) and each for each in found)


def restore(settings: list[tuple[Any, dict[str, Any]]]) -> None:
    """Put back what `layer_settings` found."""
    for config, values in settings:
        for name, value in values.items():
            setattr(config, name, value)


def _repeat_lists(config: Any, before: dict[str, Any], ranges: list[tuple[int, int]]) -> None:
    """Models ask these lists which mask, positions and cache a layer has: PEFT leaves them as they are."""
    for name in _LISTS & before.keys():
        values = before[name]
        if isinstance(values, (list, tuple)) and len(values) == before["num_hidden_layers"]:
            setattr(config, name, [values[index] for first, end in ranges for index in range(first, end)])


def _is_range(pair: Any, num_layers: int) -> bool:
    is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(end, int) for end in pair)
    return is_pair and 0 <= pair[0] < pair[1] <= num_layers


def _replicate_layers(model: nn.Module, ranges: list[tuple[int, int]]) -> None:
    num_layers = LayerStacks.of(model).num_layers or 0
    if any(isinstance(module, MolaLinear) for module in model.modules()):
        raise MolaError("`layer_replication` must be that of the model's first adapter: its layers are replaced by it.")
    if not isinstance(ranges, (list, tuple)) or not all(_is_range(pair, num_layers) for pair in ranges):
        raise MolaError(
            f"`layer_replication` must be ranges [first, end) of the model's {num_layers} layers, such as [[0, 2], "
            f"[1, {num_layers}]]: got {ranges!r}."
        )
    skip_init_on_device(replicate_layers)(model, ranges)  # else the layers have no values with `low_cpu_mem_usage`

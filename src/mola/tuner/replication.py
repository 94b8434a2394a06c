"""`layer_replication`: a model's layers repeated, with shared weights and experts of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import replicate_layers
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.tuner.layer import MolaLinear


@contextmanager
def replicated_layers(model: nn.Module, ranges: list[tuple[int, int]] | None) -> Iterator[None]:
    """Repeat ranges of layers, if there are any; the model is as it was if the block raises."""
    if not ranges:
        yield
        return
    lists = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    lists = [each for each in lists if isinstance(each[2], nn.ModuleList)]
    counts = layer_counts(model)
    _replicate_layers(model, ranges)
    try:
        yield
    except BaseException:
        for module, name, layers in lists:
            setattr(module, name, layers)
        for config, num_layers in counts:
            config.num_hidden_layers = num_layers
        raise


def layer_counts(model: nn.Module) -> list[tuple[Any, int]]:
    """Configurations of the model and its parts, with the number of layers that each has now."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [(each, each.num_hidden_layers) for each in found.values() if hasattr(each, "num_hidden_layers")]


def _replicate_layers(model: nn.Module, ranges: list[tuple[int, int]]) -> None:
    num_layers = LayerStacks.of(model).num_layers or 0
    if any(isinstance(module, MolaLinear) for module in model.modules()):
        raise MolaError("`layer_replication` must be that of the model's first adapter: its layers are replaced by it.")
    if not all(len(pair) == 2 and 0 <= pair[0] < pair[1] <= num_layers for pair in ranges):
        raise MolaError(
            f"`layer_replication` must be ranges [first, end) of the model's {num_layers} layers, such as [[0, 2], "
            f"[1, {num_layers}]]: got {ranges!r}."
        )
    replicate_layers(model, ranges)

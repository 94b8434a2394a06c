"""Which modules of a model are linears that the method can adapt, and how large they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

# The last one is never called: nn.MultiheadAttention reads its weight.
_NOT_ADAPTABLE = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, NonDynamicallyQuantizableLinear)
# Subclasses of nn.Linear that give several tensors, or another shape.
_NO_LINEAR_MAPS = ("Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear")


def adaptable(module: nn.Module) -> bool:
    """Whether the method can adapt this module.

    True for `nn.Linear` and its subclasses (bitsandbytes), Transformers' `Conv1D` and quantised linears
    that state `in_features` and `out_features`. A module that a PEFT method already wrapped counts by
    its base layer.

    Args:
        module: any module of a model.

    Returns:
        False for embeddings, convolutions, norms, modules that only contain linears, and those that another adapter
        trains in full (`modules_to_save`).
    """
    if isinstance(module, AuxiliaryTrainingWrapper):
        return False
    base = base_layer_of(module)
    if isinstance(base, _NOT_ADAPTABLE) or type(base).__name__ in _NO_LINEAR_MAPS:
        return False
    if isinstance(base, (nn.Linear, Conv1D)):
        return True
    return all(isinstance(getattr(base, size, None), int) for size in ("in_features", "out_features"))


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and of outputs of an adaptable module."""
    base: Any = base_layer_of(module)
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    # Not from the weight: quantised ones are packed.
    return base.in_features, base.out_features


def base_layer_of(module: nn.Module) -> nn.Module:
    """The module that a PEFT method wrapped, or the module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def original_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without what is inside a module that PEFT wrapped."""
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if wrapped and name.startswith(wrapped[-1]):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper) or isinstance(getattr(module, "base_layer", None), nn.Module):
            wrapped.append(name + ".")
        if name:
            yield name, module

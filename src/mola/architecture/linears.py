"""Which modules of a model are linear maps that can be adapted, and how large they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

# nn.MultiheadAttention reads the weight of a NonDynamicallyQuantizableLinear and never calls the module.
_NOT_ADAPTABLE = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, NonDynamicallyQuantizableLinear)
# Subclasses of nn.Linear that return several tensors, or a tensor of a different shape.
_NOT_LINEAR_MAPS = ("Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear")

# Linears whose weight the model passes to a kernel or a function instead of calling the module. Some models call these
# modules on CPUs and read their weights on GPUs: an adapter would differ between the two. Model type -> ends of names.
_MAMBA_LINEARS = ("x_proj", "dt_proj", "out_proj")
_READ_LINEARS = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), _MAMBA_LINEARS),
    **dict.fromkeys(("mamba2", "falcon_h1", "bamba", "zamba2", "nemotron_h", "granitemoehybrid"), ("out_proj",)),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "reformer": ("query_key", "value"),  # when it continues from a cache
    "longcat_flash": ("classifier",),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), ("correction_coefs",)),  # in training
    "mobilebert": ("predictions.dense",),
    **dict.fromkeys(("detr", "conditional_detr"), ("bbox_attention.k_proj",)),
    "neomme": ("unembedding_projection",),
}
_ALL_READ_LINEARS = tuple({end for ends in _READ_LINEARS.values() for end in ends})


def is_adaptable(module: nn.Module) -> bool:
    """Whether mola can adapt this module.

    True for `nn.Linear` and its subclasses (bitsandbytes), Transformers' `Conv1D`, and quantised linears with
    `in_features` and `out_features`. False for embeddings, convolutions, norms, modules that only contain linears, and
    modules that an adapter trains in full (`modules_to_save`). A module that a PEFT method already wraps counts by its
    base layer.
    """
    if isinstance(module, AuxiliaryTrainingWrapper):
        return False
    base = base_layer_of(module)
    if isinstance(base, _NOT_ADAPTABLE) or type(base).__name__ in _NOT_LINEAR_MAPS:
        return False
    if isinstance(base, (nn.Linear, Conv1D)):
        return True
    return all(isinstance(getattr(base, size, None), int) for size in ("in_features", "out_features"))


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Number of inputs and number of outputs of an adaptable module."""
    base: Any = base_layer_of(module)
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    # The weight of a quantised linear is packed, so its shape says nothing about the sizes.
    return base.in_features, base.out_features


def base_layer_of(module: nn.Module) -> nn.Module:
    """The module that a PEFT method wraps, or the module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def original_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without the root and without the insides of modules that PEFT wraps."""
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if wrapped and name.startswith(wrapped[-1]):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper) or isinstance(getattr(module, "base_layer", None), nn.Module):
            wrapped.append(name + ".")
        if name:
            yield name, module


def is_read_without_call(model: nn.Module, name: str) -> bool:
    """Whether a model reads a linear's weight without calling the module, so that experts on it would have no effect.

    The model type is looked up in the configurations of the model and of all modules around the linear.
    """
    if not name.endswith(_ALL_READ_LINEARS):
        return False
    module: Any = model
    for part in ("", *name.split(".")):
        module = getattr(module, part) if part else module
        model_type = getattr(getattr(module, "config", None), "model_type", None) or ""
        if any(f".{name}".endswith(f".{end}") for end in _READ_LINEARS.get(model_type, ())):
            return True
    return False

"""The layers below the first adapted one, alone: what a decision about a prompt is made from."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError


class _LayerReached(Exception):  # noqa: N818 - ends a forward pass early, and is no error
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, lowest first.

    Raises:
        MolaError: the model has no list of decoder layers, or is an encoder-decoder.
    """
    stacks = LayerStacks.of(model)
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == stacks.num_layers
        if is_list and not stacks.encoder_decoder_names and stacks.index(f"{name}.0") == 0:
            return module
    raise MolaError(
        f"skills need a causal language model with a list of decoder layers: {type(model).__name__} has none."
    )


def settled_layer(layer: int | None, num_layers: int) -> int:
    """The layer whose input a decision reads; None is the default, a third of the layers, rounded down.

    Raises:
        MolaError: there is no such layer.
    """
    layer = num_layers // 3 if layer is None else layer
    if not 0 <= layer < num_layers:
        raise MolaError(f"`layer` must be between 0 and {num_layers - 1}, the model's layers: got {layer}.")
    return layer


def hidden_states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states `(B, T, d)` among the arguments of a decoder layer."""
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def hidden_at(
    model: PreTrainedModel, layer: int, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The input of a decoder layer; the layers from `layer` on are not computed.

    Args:
        model: the base model, in eval mode.
        layer: the layer, 0 = nearest the input.
        input_ids: `(B, T)`.
        attention_mask: `(B, T)`, 1 = real token; None if no row is padded. Rows may be padded on either side.

    Returns:
        Hidden states `(B, T, d)` in the dtype of the model; what stands at padded positions has no meaning.

    Raises:
        MolaError: the model has no such layer.
    """
    layers = decoder_layers(model)
    layer = settled_layer(layer, len(layers))

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _LayerReached(hidden_states_of(args, kwargs))

    decoder = model.base_model
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if attention_mask is not None and "position_ids" in inspect.signature(decoder.forward).parameters:
        arguments["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    handle = layers[layer].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        decoder(**arguments)
    except _LayerReached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise MolaError(f"skills need a model that runs its layers in turn: {type(model).__name__} skips layer {layer}.")

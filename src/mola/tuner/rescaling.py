"""What models do by themselves in evaluation, without experts: stopped here."""

from __future__ import annotations

from typing import Any

from torch import nn

from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters


def stop_rescaling(model: nn.Module) -> None:
    """Have an RWKV keep its weights as they are: `config.rescale_every` becomes 0.

    In evaluation it divides those of every so many layers by a power of two, and hidden states as well, which keeps
    float16 from overflowing. An expert's update would stay as it is, and count as many times too much.
    """
    for module in model.modules():
        rwkv: Any = module
        # Its own: what wraps modules to save hands questions on, and in older PEFT raises where no adapter is active.
        if "layers_are_rescaled" not in vars(rwkv) or not hasattr(rwkv, "_rescale_layers"):
            continue
        if rwkv.layers_are_rescaled:
            mode, rwkv.training = rwkv.training, True
            rwkv._rescale_layers()
            rwkv.training = mode
        rwkv.config.rescale_every = 0


def stop_fast_paths(model: nn.Module) -> None:
    """Have PyTorch's own encoder layers call their linears, of which they would read the weights in evaluation."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if not any(isinstance(part, (MolaLinear, StackedParameters)) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a form of padded batches that only those paths take
        else:
            module.activation_relu_or_gelu = 0

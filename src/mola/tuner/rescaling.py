"""Models that change their own weights between training and evaluation, of which those of experts know nothing."""

from __future__ import annotations

from typing import Any

from torch import nn


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

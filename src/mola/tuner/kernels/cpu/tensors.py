"""Which tensors native functions can read."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad

PLAIN = (nn.Parameter, torch.Tensor)  # whose numbers lie at an address, as those of subclasses need not


def are_plain_cpu_tensors(*tensors: torch.Tensor) -> bool:
    """Whether all numbers lie in the CPU's memory, and no transform has to see what is done with them."""
    # Neither `torch.func`, forward-mode derivatives nor TorchScript's tracer see what a native function does.
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return False
    if torch.jit.is_tracing():
        return False
    return all(type(each) in PLAIN and each.is_cpu for each in tensors)

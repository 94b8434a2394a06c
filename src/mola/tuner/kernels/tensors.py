"""Small questions about tensors and modules that backends share."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad

PLAIN = (nn.Parameter, torch.Tensor)  # whose numbers lie at an address, as those of subclasses need not


def are_plain_cpu_tensors(*tensors: torch.Tensor) -> bool:
    """Whether all numbers lie in the CPU's memory, and no transform has to see what is done with them."""
    # Neither `torch.func` nor forward-mode derivatives see what a native function does.
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return False
    return all(type(each) in PLAIN and each.is_cpu for each in tensors)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its own forward: hooks, or another forward put in its place."""
    every = torch.nn.modules.module  # where the hooks on all modules are kept
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`(..., features)` as `(N, features)`."""
    return tensor.reshape(-1, tensor.shape[-1])

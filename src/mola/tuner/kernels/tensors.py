"""Properties of tensors and modules that decide which backend computes them."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

PLAIN_TYPES = (nn.Parameter, torch.Tensor)  # a subclass need not have its numbers at `data_ptr()`


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`(..., features)` as `(N, features)`."""
    return tensor.reshape(-1, tensor.shape[-1])


def are_plain_cpu_tensors(*tensors: torch.Tensor) -> bool:
    """Whether a native function may read the tensors: they are in the CPU's memory, and no transform is active."""
    # `torch.func`, forward-mode derivatives and TorchScript's tracer cannot follow what a native function does.
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return False
    if torch.jit.is_tracing():
        return False
    return all(type(each) in PLAIN_TYPES and each.is_cpu for each in tensors)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than the `forward` of its class: it has hooks or a replaced `forward`."""
    for_all_modules = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or for_all_modules._global_forward_hooks
        or for_all_modules._global_forward_pre_hooks
        or for_all_modules._global_backward_hooks
        or for_all_modules._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for a type of device; never for the meta device, for which torch raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def keeps_results() -> bool:
    """Whether selective activation checkpointing stores or returns operators' results, which must not be changed."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())

"""Small questions about tensors and modules that backends share."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


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


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for a type of device; on the meta device there is none, and asking raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def results_are_kept() -> bool:
    """Whether selective activation checkpointing keeps what operators return, or gives it back: none may be changed."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    kinds = checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode
    return any(isinstance(mode, kinds) for mode in _get_current_dispatch_mode_stack())


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`(..., features)` as `(N, features)`."""
    return tensor.reshape(-1, tensor.shape[-1])

"""Small pieces that the ways of computing a mixture share."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from mola.errors import MolaError
from mola.tuner.routing import Routing

logger = logging.getLogger(__name__)

_FEW_TOKENS_COMPILED = 8
PLAIN = (nn.Parameter, torch.Tensor)  # tensors whose numbers lie at an address, which others need not do


@functools.cache
def import_native(name: str) -> Any:
    """A module that needs numba; None, and one line in the log, where that is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        _say_once(logging.INFO, "Without numba, mola is slower on a CPU: pip install 'mola-peft[cpu]'.")
    except ImportError as error:  # numba refuses versions of numpy that it does not know
        _say_once(logging.WARNING, f"numba can not be used, so mola is slower on this CPU: {error}")
    return None


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)


def have_addresses(*tensors: torch.Tensor) -> bool:
    """Whether the numbers of all tensors lie in the CPU's memory, and nobody wants to see what is done with them."""
    # Neither `torch.func` nor derivatives forward see what a native function does.
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return False
    return all(type(each) in PLAIN and each.is_cpu for each in tensors)


def refuse_second_derivatives() -> None:
    """For a backward pass written out: under `create_graph` its own gradient would be wrong in silence.

    Raises:
        MolaError: gradients of the gradient are asked for.
    """
    if torch.is_grad_enabled():
        raise MolaError(
            "second derivatives through a mixture of experts are not supported: leave out `create_graph=True`."
        )


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to know when the module is called, or has replaced its forward."""
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


def reading_chosen_pays(routing: Routing, rows: torch.Tensor, num_experts: int) -> bool:
    """Whether reading matrices token by token is faster: measured where a compiler writes the loops of a CPU."""
    on_cpu = torch.compiler.is_compiling() and rows.is_cpu
    return routing.expert_indices.numel() < num_experts or (on_cpu and len(rows) <= _FEW_TOKENS_COMPILED)


def update_of_chosen(
    rows: torch.Tensor, experts_A: torch.Tensor, experts_B: torch.Tensor, routing: Routing, scaling: float
) -> torch.Tensor:
    """Update of each token from its chosen experts' matrices alone, float32 `(N, out)` (float64 for float64).

    For compilers, which read the matrices where they are; without a compiler they would be copied for every token.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    chosen_A, chosen_B = experts_A[routing.expert_indices], experts_B[routing.expert_indices]  # (N, top_k, r, ...)
    hidden = (chosen_A.to(dtype) * rows.to(dtype)[:, None, None, :]).sum(-1)  # (N, top_k, r)
    hidden = hidden * (routing.routing_weights * scaling).unsqueeze(-1)
    return (hidden.unsqueeze(-1) * chosen_B.to(dtype)).sum((1, 2))

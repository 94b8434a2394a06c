"""A mixture for few tokens without gradients on the CPU, as when text is generated: calls cost more than arithmetic.

- With numba (the extra `cpu`) the update is one call of a native function (`mola.tuner.native`): `native_update`, and
  for compilers the operator `torch.ops.mola.add_few`.
- Without it, `compute_few`: the thin products are made in float32 for narrower formats too, which is faster for few
  rows, and more exact; experts are chosen by one sort, and nothing is kept for a backward pass.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from mola.tuner.pieces import as_rows, base_output
from mola.tuner.routing import largest_first

logger = logging.getLogger(__name__)

MAX_TOKENS = 32
_PLAIN = (nn.Parameter, torch.Tensor)


def is_few(x: torch.Tensor) -> bool:
    """Whether `x: (..., in)` is computed this way when no gradient is asked for."""
    return x.is_cpu and 0 < x.numel() <= MAX_TOKENS * x.shape[-1] and not torch.is_autocast_enabled("cpu")


def native_update(
    x: torch.Tensor, experts_A: torch.Tensor, experts_B: torch.Tensor, router: torch.Tensor
) -> Callable[[torch.Tensor, float, int], torch.Tensor] | None:
    """The update of few tokens as a native function.

    Args:
        x: `(..., in)`, for which `is_few` holds.
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        router: `(E, in)`.

    Returns:
        `add(output, scaling, top_k)`, which adds the update to the base output in place and returns it; the output is
        contiguous and in the format of `x`. None where there is no native function: without numba, for formats but
        float32 and bfloat16, for tensors that are no plain ones of the CPU, under `torch.func`.
    """
    # Neither `torch.func` nor derivatives forward see what it does.
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return None
    if router.dtype != torch.float32 or experts_A.dtype != experts_B.dtype or type(x) is not torch.Tensor:
        return None
    for tensor in (experts_A, experts_B, router):
        if type(tensor) not in _PLAIN or not tensor.is_cpu or not tensor.is_contiguous():
            return None
    kernel = _kernel(x.dtype, experts_A.dtype)
    if kernel is None:
        return None
    num_experts, r, in_features = experts_A.shape
    out_features = experts_B.shape[2]
    x = x.contiguous()
    if x.shape[-1] != in_features or router.shape != (num_experts, in_features) or len(experts_B) != num_experts:
        return None  # for torch to complain about

    def add(output: torch.Tensor, scaling: float, top_k: int) -> torch.Tensor:
        if output.shape != (*x.shape[:-1], out_features):
            raise ValueError(f"The base layer's output has shape {tuple(output.shape)}, input {tuple(x.shape)}.")
        sizes = x.numel() // in_features, num_experts, r, in_features, out_features
        kernel(*(tensor.data_ptr() for tensor in (x, router, experts_A, experts_B, output)), *sizes, scaling, top_k)
        return output

    return add


@torch.compiler.assume_constant_result
def has_native_update(values: torch.dtype, weights: torch.dtype) -> bool:
    """Whether there is a native function for these formats of the input and of A and B; a compiler may ask."""
    return _kernel(values, weights) is not None


@functools.cache
def _kernel(values: torch.dtype, weights: torch.dtype) -> Any:
    """`mola.tuner.native.kernel`; None without numba."""
    native = import_native("mola.tuner.native")
    return None if native is None else native.kernel(values, weights)


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


def _add_few(output, x, experts_A, experts_B, router, scaling: float, top_k: int) -> None:
    num_experts, r, in_features = experts_A.shape
    kernel = _kernel(x.dtype, experts_A.dtype)
    # Written out, here and for the arguments: this is called for every token and linear.
    contiguous = x.is_contiguous() and output.is_contiguous() and router.is_contiguous()
    if kernel is None or not (contiguous and experts_A.is_contiguous() and experts_B.is_contiguous()):
        raise RuntimeError("mola::add_few needs numba, and contiguous tensors in float32 or bfloat16.")
    kernel(
        x.data_ptr(),
        router.data_ptr(),
        experts_A.data_ptr(),
        experts_B.data_ptr(),
        output.data_ptr(),
        x.numel() // in_features,
        num_experts,
        r,
        in_features,
        experts_B.size(2),
        scaling,
        top_k,
    )


# As a compiler sees it; with the decorator `torch.library.custom_op` a call takes several times as long.
_LIBRARY = torch.library.Library("mola", "FRAGMENT")
_LIBRARY.define(
    "add_few(Tensor(a!) output, Tensor x, Tensor experts_A, Tensor experts_B, Tensor router, float scaling, int top_k)"
    " -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_LIBRARY.impl("add_few", _add_few, "CPU")
_LIBRARY.impl("add_few", lambda *arguments: None, "Meta")


def gates_of_few(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`mola.tuner.routing.choose_gates` with tokens first: gates `(N, E)`, chosen experts `(N, top_k)`."""
    num_experts = logits.shape[1]
    if top_k == num_experts:
        return torch.softmax(logits, dim=-1), torch.arange(num_experts, device=logits.device).expand_as(logits)
    largest, expert_indices = largest_first(logits, top_k)
    gates = torch.zeros_like(logits).scatter_(1, expert_indices, torch.softmax(largest, dim=-1))
    return gates, expert_indices


def compute_few(result, weight, bias, x, experts_A, experts_B, router, settings):
    """The computation of `add_mixture` without dropout; its three results."""
    num_experts, r, _ = experts_A.shape
    dtype = torch.promote_types(settings.dtype, torch.float32)
    inputs = as_rows(x).to(dtype)
    logits = torch.mm(inputs, router.to(dtype).t())  # (N, E)
    hidden = torch.mm(inputs, experts_A.flatten(0, 1).to(dtype).t())  # (N, E*r)
    gates, expert_indices = gates_of_few(logits, settings.top_k)
    hidden.view(-1, num_experts, r).mul_(gates.unsqueeze(-1))
    output = base_output(result, weight, bias, x.to(settings.dtype))
    rows = output.view(-1, output.shape[-1])
    matrix_B = experts_B.flatten(0, 1)
    if rows.dtype == matrix_B.dtype == dtype:
        rows.addmm_(hidden, matrix_B, alpha=settings.scaling)
    else:
        rows.add_(torch.mm(hidden, matrix_B.to(dtype)), alpha=settings.scaling)
    return output, logits.t(), expert_indices.t()

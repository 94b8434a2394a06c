"""Dropout of the experts' input. Forward and backward pass share one tensor, the dropout mask, in one of two forms:

- on a CPU with numba (the extra `cpu`) and on a GPU with Triton it is a seed, from which a native function draws the
  mask again whenever it is needed;
- everywhere else it is the mask itself, as booleans.
"""

from __future__ import annotations

from typing import Any

import torch

from mola.tuner.kernels import native
from mola.tuner.kernels.tensors import are_plain_cpu_tensors

_STEPS = 1 << 16  # booleans on a CPU: 16 random bits decide about each element
_WORDS = 1 << 32  # a seed on a CPU: 32 bits decide about each element


def sample_dropout_mask(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Draw which elements of `x` are kept.

    Args:
        x: a floating-point tensor; only its shape, dtype and device matter.
        p: probability with which an element is dropped, `0 <= p < 1`.

    Returns:
        The mask for `drop`, and the probability with which an element is kept: `1 - p`, rounded to a step that the
        random bits can express.
    """
    if x.is_cuda or native.is_interpreting():
        launch = native.load("launch", "gpu")
        sampled = None if launch is None else launch.sample_seed(x, p)
    else:
        sampled = _sample_cpu_seed(x, p)
    return sampled or (_sample_booleans(x, p), keep_probability(x, p))


def drop(rows: torch.Tensor, dropout_mask: torch.Tensor | None) -> torch.Tensor:
    """`rows` with 0 for every dropped element; unchanged without a mask.

    Args:
        rows: with the same number of elements as the tensor that the mask was drawn for, in any shape and dtype.
        dropout_mask: from `sample_dropout_mask`, or booleans.
    """
    if dropout_mask is None:
        return rows
    if dropout_mask.dtype == torch.bool:
        return torch.where(dropout_mask.reshape(rows.shape), rows, 0.0)
    if is_gpu_seed(dropout_mask):
        return native.load("launch", "gpu").drop(rows, dropout_mask)
    rows = rows.contiguous()
    dropped = torch.empty_like(rows)
    _drop_kernel(rows.element_size())(rows.data_ptr(), dropout_mask.data_ptr(), dropped.data_ptr(), rows.numel())
    return dropped


def is_gpu_seed(dropout_mask: torch.Tensor) -> bool:
    """Whether the mask is a seed for Triton: one number of 64 bits. Seeds of the CPU are words of 32 bits."""
    return dropout_mask.dtype is torch.int64


def keep_probability(x: torch.Tensor, p: float) -> float:
    """Probability with which `_sample_booleans` keeps an element: `1 - p`, on a CPU to the nearest of 65,536 steps."""
    return 1.0 - (_steps(p) / _STEPS if x.device.type == "cpu" else p)


def _sample_cpu_seed(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float] | None:
    """The seed, and the probability of keeping; None if there is no native function.

    The seed has three words of 32 bits: two random ones, and the threshold `p * 2**32` below which an element is
    dropped.
    """
    if not are_plain_cpu_tensors(x) or _drop_kernel(x.element_size()) is None:
        return None
    threshold = min(round(p * _WORDS), _WORDS - 1)
    seed = torch.empty(3, dtype=torch.int32, device="cpu").random_(-(_WORDS // 2), _WORDS // 2)
    seed[2] = threshold - _WORDS if threshold >= _WORDS // 2 else threshold  # the same 32 bits, signed
    return seed, 1.0 - threshold / _WORDS


def _drop_kernel(itemsize: int) -> Any:
    functions = native.load("jit_dropout")
    return None if functions is None else functions.kernel(itemsize)


def _sample_booleans(x: torch.Tensor, p: float) -> torch.Tensor:
    """Booleans of the shape of `x`, False with probability `p`; see `keep_probability`.

    On a CPU each 64-bit draw decides about four elements: several times faster than a floating-point draw for each.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep_probability(x, p))
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= _steps(p) - _STEPS // 2).view(x.shape)


def _steps(p: float) -> int:
    return min(round(p * _STEPS), _STEPS - 1)

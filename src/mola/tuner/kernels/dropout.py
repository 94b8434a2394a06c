"""Which elements of an input dropout keeps: a tensor that forward and backward pass share.

- On the CPU with numba (the extra `cpu`), and on GPUs with Triton: a seed, from which the mask is drawn again wherever
  it is needed.
- Else: the mask, booleans.
"""

from __future__ import annotations

import torch

from mola.tuner.kernels import native

_STEPS = 1 << 16  # of a probability that 16 bits decide
_native = native.load("dropout")  # without numba as yet


def sample_dropout_mask(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Draw which elements of `x` are kept.

    Args:
        x: a floating-point tensor; only its shape, dtype and device matter.
        p: probability with which an element is dropped, `0 <= p < 1`.

    Returns:
        What `drop` needs, and the probability with which an element is kept: `1 - p`, to the nearest of as many steps
        as the drawn bits decide between.
    """
    compiled = native.load("launch", "gpu") if x.is_cuda or native.is_interpreting() else _native
    sampled = None if compiled is None else compiled.sample_seed(x, p)
    return sampled or (_sample_booleans(x, p), keep_probability(x, p))


def drop(rows: torch.Tensor, dropout_mask: torch.Tensor | None) -> torch.Tensor:
    """`rows` with 0 for what the mask drops; as they are without a mask.

    Args:
        rows: as many elements as the tensor that the mask was drawn for, in any shape and dtype.
        dropout_mask: from `sample_dropout_mask`, or booleans.
    """
    if dropout_mask is None:
        return rows
    if dropout_mask.dtype == torch.bool:
        return torch.where(dropout_mask.reshape(rows.shape), rows, 0.0)
    if is_gpu_seed(dropout_mask):
        return native.load("launch", "gpu").drop(rows, dropout_mask)
    return _native.drop(rows, dropout_mask)


def is_gpu_seed(dropout_mask: torch.Tensor) -> bool:
    """Whether it is a seed that Triton draws from: one of 64 bits; those of the CPU are words of 32."""
    return dropout_mask.dtype is torch.int64


def _sample_booleans(x: torch.Tensor, p: float) -> torch.Tensor:
    """Booleans of the shape of `x`, False with probability `p`; see `keep_probability`.

    On the CPU 16 random bits decide about an element, a quarter of a 64-bit draw: several times
    faster than a floating-point draw for each.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep_probability(x, p))
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= _steps(p) - _STEPS // 2).view(x.shape)


def keep_probability(x: torch.Tensor, p: float) -> float:
    """Probability with which `_sample_booleans` says True: `1 - p`, on the CPU to the nearest of 65,536 steps."""
    return 1.0 - (_steps(p) / _STEPS if x.device.type == "cpu" else p)


def _steps(p: float) -> int:
    return min(round(p * _STEPS), _STEPS - 1)

"""Dropout from a seed on a CPU: which elements are kept is drawn again wherever it is needed; see `jit_dropout`."""

from __future__ import annotations

from typing import Any

import torch

from mola.tuner.kernels import native
from mola.tuner.kernels.cpu.tensors import are_plain_cpu_tensors

_WORDS = 1 << 32


def sample_seed(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float] | None:
    """Two words of a seed and one that says what is dropped, and the probability of keeping; None without numba."""
    if not are_plain_cpu_tensors(x) or _kernel(x.element_size()) is None:
        return None
    threshold = min(round(p * _WORDS), _WORDS - 1)
    seed = torch.empty(3, dtype=torch.int32, device="cpu").random_(-(_WORDS // 2), _WORDS // 2)
    seed[2] = threshold - _WORDS if threshold >= _WORDS // 2 else threshold  # the same 32 bits
    return seed, 1.0 - threshold / _WORDS


def drop(rows: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """`rows` with 0 for what the seed drops."""
    rows = rows.contiguous()
    dropped = torch.empty_like(rows)
    _kernel(rows.element_size())(rows.data_ptr(), seed.data_ptr(), dropped.data_ptr(), rows.numel())
    return dropped


def _kernel(itemsize: int) -> Any:
    functions = native.load("jit_dropout")
    return None if functions is None else functions.kernel(itemsize)

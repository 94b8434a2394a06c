"""A layer's matrix products, by the library that is fast for them on this processor; see `cpu/onednn.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mola.tuner.kernels import native
from mola.tuner.kernels.api import MixtureInputs
from mola.tuner.kernels.tensors import as_rows

_onednn = native.load("onednn")  # which needs no numba


def wants_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether oneDNN makes the product of two tensors; a compiler may ask."""
    # The dtype is asked first, for this is called several times for every linear.
    return a.dtype is torch.float32 and _onednn is not None and _onednn.is_wanted(a, b)


def onednn_is_faster() -> bool:
    """Whether oneDNN is asked on this processor, in float32."""
    return _onednn is not None and _onednn.onednn_is_faster()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` of a frozen `weight: (out, in)`, where no gradient is recorded."""
    return _onednn.fast_linear(x, weight, bias) if wants_onednn(x, weight) else F.linear(x, weight, bias)


def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor) -> torch.Tensor:
    """`x W^T + b + addend` of matrices, made at once, where `wants_onednn` says so."""
    return _onednn.linear_add(x, weight, bias, addend)


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of two matrices, where no gradient is recorded."""
    return _onednn.linear_by_onednn(a, b.t(), None) if wants_onednn(a, b) else torch.mm(a, b)


def addmm_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add `a @ b` to `total` in place, in its dtype, where no gradient is recorded."""
    if total.dtype is not a.dtype or wants_onednn(a, b):
        return total.add_(mm(a, b))
    return total.addmm_(a, b)


def base_output(inputs: MixtureInputs, x: torch.Tensor) -> torch.Tensor:
    """`x W^T + b`, or a copy of the base output that is not narrower than `x`; contiguous, to be added to."""
    if inputs.weight is not None:  # of rows: with more dimensions the product is a view, which no one may change
        rows = linear(as_rows(x), inputs.weight, inputs.bias)
        return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(inputs.weight)])
    assert inputs.result is not None
    dtype = torch.promote_types(inputs.result.dtype, x.dtype)
    return inputs.result.to(dtype, copy=True, memory_format=torch.contiguous_format)

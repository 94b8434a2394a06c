"""A layer's matrix products, by the library that is faster on this processor. No product records a gradient.

For float32 torch calls MKL, for bfloat16 oneDNN; both are part of torch. On AMD processors with AVX-512, MKL is slower
than oneDNN: much slower on Zen 5, where MKL uses half of AVX-512, and somewhat slower on Zen 4. On these processors
oneDNN computes a layer's float32 products: those of the experts, and that of the base layer if it is a plain frozen
linear map. `MOLA_ONEDNN=0` in the environment leaves all products to torch, `MOLA_ONEDNN=1` uses oneDNN on every CPU.
"""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mola.errors import MolaError
from mola.tuner.kernels import native
from mola.tuner.kernels.api import MixtureInputs
from mola.tuner.kernels.tensors import PLAIN_TYPES, are_plain_cpu_tensors, as_rows

_CPU_INFO = Path("/proc/cpuinfo")  # on Linux `platform.processor` does not name the vendor
# Measured on Zen 4 and Zen 5. Zen 3 belongs to Zen 4's family, but has no AVX-512.
_VENDOR, _FIRST_FAMILY = "AuthenticAMD", 25
_VARIABLE = "MOLA_ONEDNN"
_MAX_TOKENS, _COLUMNS = 32, 16  # mola's native product: at most 32 tokens, input features in multiples of 16


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` of a frozen `weight: (out, in)`."""
    return float32_linear(x, weight, bias) if uses_onednn(x, weight) else F.linear(x, weight, bias)


def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor) -> torch.Tensor:
    """`x W^T + b + addend` of matrices, in one call of oneDNN; call it only if `uses_onednn(x, weight)` is true."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend, weight, bias, "add")


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of two matrices."""
    return _onednn_linear(a, b.t(), None) if uses_onednn(a, b) else torch.mm(a, b)


def addmm_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add `a @ b` to `total` in place, in the dtype of `total`."""
    if total.dtype is not a.dtype or uses_onednn(a, b):
        return total.add_(mm(a, b))
    return total.addmm_(a, b)


def base_output(inputs: MixtureInputs, x: torch.Tensor) -> torch.Tensor:
    """A new contiguous tensor with the base output, to which the update can be added in place.

    It is `x W^T + b` if the inputs hold the base weight; otherwise a copy of their base output, in the wider of its
    dtype and that of `x`.
    """
    if inputs.weight is not None:
        # As rows: with more dimensions the product would be a view, which must not be changed in place.
        rows = linear(as_rows(x), inputs.weight, inputs.bias)
        return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(inputs.weight)])
    assert inputs.base_output is not None
    dtype = torch.promote_types(inputs.base_output.dtype, x.dtype)
    return inputs.base_output.to(dtype, copy=True, memory_format=torch.contiguous_format)


def uses_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether oneDNN computes the product of two tensors; `torch.compile` can trace this function."""
    # The dtype comes first, because this is called several times for every linear.
    if a.dtype is not torch.float32 or b.dtype is not torch.float32:
        return False
    if not onednn_is_faster() or 0 in (a.numel(), b.numel()):
        return False
    if torch.compiler.is_compiling():
        return a.is_cpu and type(b) in PLAIN_TYPES
    return are_plain_cpu_tensors(a, b)


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    """Whether oneDNN computes float32 products on this processor.

    The processor's name decides and not a measurement, because the library decides the last bits of every result.

    Raises:
        MolaError: `MOLA_ONEDNN` is neither 0 nor 1.
    """
    backend: Any = torch.backends.mkldnn
    return _is_onednn_chosen() and backend.is_available() and backend.enabled


@functools.cache
def _is_onednn_chosen() -> bool:
    choice = os.environ.get(_VARIABLE, "")
    if choice not in ("", "0", "1"):
        raise MolaError(f"The environment variable {_VARIABLE} must be 0 or 1, or not be set: got {choice!r}.")
    if choice == "0" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return choice == "1" or (torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_new_amd_processor())


def _is_new_amd_processor() -> bool:
    try:
        description = _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        description = platform.processor()
    # "cpu family : 26" on Linux, "Family 26" on Windows
    family = re.search(r"family\s*:?\s*(\d+)", description, re.IGNORECASE)
    return _VENDOR in description and family is not None and int(family.group(1)) >= _FIRST_FAMILY


def float32_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` for inputs that `uses_onednn` accepts.

    mola's native kernel computes a few tokens on one thread, oneDNN everything else.
    """
    kernel = _native_linear(x, weight, bias)
    if kernel is None:
        return _onednn_linear(x, weight, bias)
    x, (out_features, in_features) = x.contiguous(), weight.shape
    output = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32, device="cpu")
    bias_address = 0 if bias is None else bias.data_ptr()
    num_tokens = x.numel() // in_features
    kernel(x.data_ptr(), weight.data_ptr(), bias_address, output.data_ptr(), num_tokens, in_features, out_features)
    return output


def _native_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """The native function `linear_kernel` for these tensors; None if it cannot compute them."""
    in_features = weight.shape[1]
    if x.shape[-1] != in_features:
        return None  # torch raises its own error
    if x.numel() > _MAX_TOKENS * in_features or torch.get_num_threads() > 1 or in_features % _COLUMNS:
        return None
    if not weight.is_contiguous() or not are_plain_cpu_tensors(x, weight):
        return None
    if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous() and are_plain_cpu_tensors(bias)):
        return None
    functions = native.load("jit_decode")
    return None if functions is None else functions.linear_kernel()


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")

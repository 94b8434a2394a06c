"""Matrix products by oneDNN, where it is faster than what torch asks: float32 on some AMD processors.

In float32 torch asks MKL, which on AMD's processors with AVX-512 takes longer than oneDNN, which torch has too and uses
for bfloat16: much longer on Zen 5, where it computes with half of AVX-512, somewhat on Zen 4. So on such a processor a
layer's products are made by oneDNN: those of its experts, and that of a base layer which is nothing but a frozen linear
map. `MOLA_ONEDNN=0` in the environment leaves them to torch, `MOLA_ONEDNN=1` asks oneDNN on other processors too.
"""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from mola.errors import MolaError
from mola.tuner.kernels import native
from mola.tuner.kernels.cpu.tensors import PLAIN, are_plain_cpu_tensors

_CPU_FACTS = Path("/proc/cpuinfo")  # of Linux, where `platform` does not know whose processor it is
# Zen 4 and Zen 5 were measured; Zen 3 has the family of Zen 4, but not AVX-512.
_VENDOR, _FIRST_FAMILY = "AuthenticAMD", 25
_CHOICE = "MOLA_ONEDNN"
_MAX_TOKENS, _COLUMNS = 32, 16  # at most so many tokens, and inputs in multiples, by the native function


def fast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` where `is_wanted` says so: few tokens on one thread by a function of mola's, which reads faster."""
    kernel = _native_linear(x, weight, bias)
    if kernel is None:
        return linear_by_onednn(x, weight, bias)
    x, (out_features, in_features) = x.contiguous(), weight.shape
    output = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32, device="cpu")
    at = 0 if bias is None else bias.data_ptr()
    num_tokens = x.numel() // in_features
    kernel(x.data_ptr(), weight.data_ptr(), at, output.data_ptr(), num_tokens, in_features, out_features)
    return output


def _native_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    in_features = weight.shape[1]
    if x.shape[-1] != in_features:
        return None  # whoever is asked next says so
    if x.numel() > _MAX_TOKENS * in_features or torch.get_num_threads() > 1 or in_features % _COLUMNS:
        return None
    if not weight.is_contiguous() or not are_plain_cpu_tensors(x, weight):
        return None
    if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous() and are_plain_cpu_tensors(bias)):
        return None
    functions = native.load("jit_linear")
    return None if functions is None else functions.kernel()


def linear_by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, addend: torch.Tensor) -> torch.Tensor:
    """`x W^T + b + addend` of matrices, made at once, where `is_wanted` says so."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend, weight, bias, "add")


def is_wanted(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether oneDNN makes the product of two tensors; a compiler may ask."""
    if a.dtype != torch.float32 or b.dtype != torch.float32 or not onednn_is_faster() or 0 in (a.numel(), b.numel()):
        return False
    if torch.compiler.is_compiling():
        return a.is_cpu and type(b) in PLAIN
    return are_plain_cpu_tensors(a, b)


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    """Whether oneDNN is asked in float32: on AMD's processors with AVX-512, where it was seen to be faster than MKL.

    Not timed here: which library computes decides about the last bits of a result.

    Raises:
        MolaError: `MOLA_ONEDNN` is neither 0 nor 1.
    """
    backend: Any = torch.backends.mkldnn
    return _is_chosen() and backend.is_available() and backend.enabled


@functools.cache
def _is_chosen() -> bool:
    choice = os.environ.get(_CHOICE, "")
    if choice not in ("", "0", "1"):
        raise MolaError(f"The environment variable {_CHOICE} must be 0 or 1, or not be set: got {choice!r}.")
    if choice == "0" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return choice == "1" or (torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_such_a_processor())


def _is_such_a_processor() -> bool:
    try:
        facts = _CPU_FACTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = platform.processor()
    # "cpu family : 26" on Linux, "Family 26" on Windows
    family = re.search(r"family\s*:?\s*(\d+)", facts, re.IGNORECASE)
    return _VENDOR in facts and family is not None and int(family.group(1)) >= _FIRST_FAMILY

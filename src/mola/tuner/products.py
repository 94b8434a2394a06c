"""Matrix products by the library that is fast for them on this processor.

In float32 torch asks MKL, which on processors of AMD computes with half of what AVX-512 has. oneDNN, which torch has too
and uses for bfloat16, computes with all of it: on such a processor the products of a mixture take half the time.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from mola.tuner.pieces import have_addresses

_CPU_FACTS = Path("/proc/cpuinfo")  # of Linux, where `platform` does not know whose processor it is
_VENDOR = "AuthenticAMD"


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of two matrices, for code that autograd does not record."""
    if _wants_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`total + a @ b` in place of `total`, in its format."""
    if total.dtype != a.dtype or _wants_onednn(a, b):
        return total.add_(product(a, b))
    return total.addmm_(a, b)


def _wants_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and onednn_is_faster()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and a.numel() > 0
        and b.numel() > 0
        and have_addresses(a, b)
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor where oneDNN was measured to be faster than MKL in float32: AMD's with AVX-512.

    Not timed here: which library computes decides about the last bits of a result.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        facts = _CPU_FACTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = platform.processor()
    return _VENDOR in facts

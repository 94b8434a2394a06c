"""What native functions share: compiling and keeping them, dtypes as bits, the choice of experts."""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set, and these functions are none of Python's")

logger = logging.getLogger(__name__)

FORMATS = {torch.float32: np.float32, torch.bfloat16: np.uint16}
# All but assuming that there is neither NaN nor infinity.
MATH = {"reassoc", "contract", "nsz", "arcp"}


def _to_pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _bitcast(source, target) -> Any:
    def cast(typing_context, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return intrinsic(cast)


pointer: Any = intrinsic(_to_pointer)  # of an address, an integer
_as_float = _bitcast(types.uint32, types.float32)
_as_bits = _bitcast(types.float32, types.uint32)


def widen(value):
    """A number as float32; `uint16` is the bits of a bfloat16."""


@overload(widen, inline="always")
def _widen_overload(value):
    if value == types.uint16:
        return lambda value: _as_float(np.uint32(np.uint32(value) << np.uint32(16)))
    return lambda value: value


def narrow(value, like):
    """A float32 in the format of `like`, to the nearest, ties to even."""


@overload(narrow, inline="always")
def _narrow_overload(value, like):
    if like != types.uint16:
        return lambda value, like: value

    def to_bfloat16(value, like):
        bits = _as_bits(value)
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
        # Without a branch: it is inlined where loops are to become vectors.
        is_nan = np.uint32(np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000))
        return np.uint16(np.uint32(rounded >> np.uint32(16)) | np.uint32(is_nan * np.uint32(0x7FC0)))

    return to_bfloat16


# Inlined, here and below: of what is called, the process that compiles keeps another version than the disk.
@numba.njit(forceinline=True)
def is_among(number, numbers):
    """Whether it is one of them."""
    for each in numbers:  # noqa: SIM110 - numba knows no `any` of a generator
        if each == number:
            return True
    return False


@numba.njit(fastmath=MATH, forceinline=True)
def choose(logits, chosen, gates, scaling):
    """Experts with the largest logits, which are written over, and their gates times scaling; both `(top_k,)`."""
    total, largest = np.float32(0), np.float32(0)
    for k in range(len(chosen)):
        best = 0
        for expert in range(1, len(logits)):
            value, most = logits[expert], logits[best]
            if value > most or (value != value and most == most):  # of equal ones the first; NaN is the largest
                best = expert
        if logits[best] == -np.inf:  # it may be one that is chosen already
            best = 0
            while is_among(best, chosen[:k]):
                best += 1
        if k == 0:
            largest = logits[best]
        chosen[k] = best
        gates[k] = np.exp(logits[best] - largest)
        total += gates[k]
        logits[best] = -np.inf
    for k in range(len(chosen)):
        gates[k] = gates[k] / total * scaling


def compiled(function: Any, signature: Any, *inner: Any) -> Any:
    """A function compiled for a signature; what was compiled is kept on disk where that is possible.

    `inner` are the dtypes and numbers that the function has from around it.
    """
    # All by the name of the file. numba looks at the function's own source only, and what it calls is compiled in; it
    # numbers what shares an index without a lock: of two processes one could leave its code under the other's number.
    key = _sources_digest(), numba.__version__, cpu_target.target_context.codegen().magic_tuple(), inner
    function.__qualname__ += f"_{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    for is_again in (False, True):
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError) as error:  # no folder can be written, or the disk is full
            logger.warning("Compiled code could not be kept on disk and is compiled in every process: %s", error)
            break
        except Exception:  # what is there was cut off
            if is_again:
                raise
            _remove(function)
    return numba.njit(signature, nogil=True)(function)


def _remove(function: Any) -> None:
    """What is on disk of a function; numba reads it before it writes it anew."""
    folder, name = Path(FunctionCache(function).cache_path), function.__qualname__.rpartition(".")[2]
    for path in folder.glob(f"*{name}*.nb[ic]"):  # index and code
        path.unlink(missing_ok=True)


@functools.cache
def _sources_digest() -> str:
    """What the sources of all native functions are known by."""
    sources = sorted(Path(__file__).parent.glob("jit*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]

"""What native functions share: compilation and its cache, bfloat16 as bits, the choice of experts."""

from __future__ import annotations

import functools
import hashlib
import logging
import pickle
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set, and these functions cannot run in Python")

logger = logging.getLogger(__name__)

FORMATS = {torch.float32: np.float32, torch.bfloat16: np.uint16}  # bfloat16 as integers with its bits
# Fast mathematics, but without the assumption that there is no NaN and no infinity.
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


pointer: Any = intrinsic(_to_pointer)  # an integer, an address, as a pointer
_as_float = _bitcast(types.uint32, types.float32)
_as_bits = _bitcast(types.float32, types.uint32)


def widen(value):
    """Convert a number to float32; an `uint16` holds the bits of a bfloat16."""


@overload(widen, inline="always")
def _widen_overload(value):
    if value == types.uint16:
        return lambda value: _as_float(np.uint32(np.uint32(value) << np.uint32(16)))
    return lambda value: value


def narrow(value, like):
    """Round a float32 to the dtype of `like`, to the nearest number, ties to even."""


@overload(narrow, inline="always")
def _narrow_overload(value, like):
    if like != types.uint16:
        return lambda value, like: value

    def to_bfloat16(value, like):
        bits = _as_bits(value)
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
        # Without a branch, so that loops around it can become vector instructions.
        is_nan = np.uint32(np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000))
        return np.uint16(np.uint32(rounded >> np.uint32(16)) | np.uint32(is_nan * np.uint32(0x7FC0)))

    return to_bfloat16


# `forceinline`, here and in other files: without it, the process that compiles a function and one that loads it from
# the disk would run different code.
@numba.njit(forceinline=True)
def is_among(number, numbers):
    """Whether `number` is one of `numbers`."""
    for each in numbers:  # noqa: SIM110 - numba knows no `any` of a generator
        if each == number:
            return True
    return False


@numba.njit(fastmath=MATH, forceinline=True)
def choose_experts(logits, chosen, gates, scaling):
    """Choose the experts with the largest logits, and compute their gates times scaling.

    Args:
        logits: of one token, `(E,)`; changed.
        chosen: written, expert of each choice, `(top_k,)`.
        gates: written, gate of each choice times scaling, `(top_k,)`.
        scaling: factor of the gates.
    """
    total, largest = np.float32(0), np.float32(0)
    for k in range(len(chosen)):
        best = 0
        for expert in range(1, len(logits)):
            value, most = logits[expert], logits[best]
            if value > most or (value != value and most == most):  # ties go to the first; NaN is the largest
                best = expert
        if logits[best] == -np.inf:  # all that are left are -inf, and `best` may already be chosen
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


def compiled(function: Any, signature: Any, *constants: Any) -> Any:
    """Compile a function for a signature; the compiled code is kept on disk if a folder can be written.

    Args:
        function: reads its constants from the function around it.
        signature: types of its arguments.
        constants: dtypes and numbers that the function reads from around it.
    """
    # Everything that decides about the code becomes part of the function's name, and so of its file's. numba compares
    # the function's own source only, although what it calls is compiled in. And it numbers versions of one name without
    # a lock: two processes could store their code under the same number.
    key = _sources_digest(), numba.__version__, cpu_target.target_context.codegen().magic_tuple(), constants
    function.__qualname__ += f"_{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    try:
        return numba.njit(signature, nogil=True, cache=True)(function)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        # No folder can be written, the disk is full, or a file in the cache is damaged.
        logger.warning("Compiled code cannot be kept on disk and is compiled in every process: %s", error)
        return numba.njit(signature, nogil=True)(function)


@functools.cache
def _sources_digest() -> str:
    """A digest of the sources of all native functions."""
    sources = sorted(Path(__file__).parent.glob("jit*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]

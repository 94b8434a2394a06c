"""A mixture for few tokens as one native function, which numba compiles: the extra `cpu`.

As operators of torch the update of one linear is some twenty calls, which cost more than its arithmetic, and it reads
the matrices of all experts. The function chooses a token's experts, reads their matrices only, and adds the update to
the base output, all in one call. It computes in float32.

It is compiled when first needed (a few seconds), then kept on disk, next to this file or in numba's cache folder.
"""

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
from numba.extending import intrinsic, overload

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


@numba.njit(fastmath=MATH, inline="always")
def _dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * widen(b[i])
    return total


@numba.njit(fastmath=MATH, inline="always")
def _dots(a, b0, b1, b2, b3):
    s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(a)):
        s0 += a[i] * widen(b0[i])
        s1 += a[i] * widen(b1[i])
        s2 += a[i] * widen(b2[i])
        s3 += a[i] * widen(b3[i])
    return s0, s1, s2, s3


# Inlined, here and below: of what is called, the process that compiles keeps another version than the disk.
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
        if k == 0:
            largest = logits[best]
        chosen[k] = best
        gates[k] = np.exp(logits[best] - largest)
        total += gates[k]
        logits[best] = -np.inf
    for k in range(len(chosen)):
        gates[k] = gates[k] / total * scaling


@numba.njit(fastmath=MATH, forceinline=True)
def _add(x, router, experts_A, experts_B, output, scaling, top_k):
    num_tokens, in_features = x.shape
    num_experts, r, out_features = experts_B.shape
    row = np.empty(in_features, np.float32)
    logits = np.empty(num_experts, np.float32)
    chosen = np.empty(top_k, np.int64)
    gates = np.empty(top_k, np.float32)
    update = np.empty(out_features, np.float32)
    for token in range(num_tokens):
        for i in range(in_features):
            row[i] = widen(x[token, i])
        expert = 0
        while expert + 4 <= num_experts:
            logits[expert], logits[expert + 1], logits[expert + 2], logits[expert + 3] = _dots(
                row, router[expert], router[expert + 1], router[expert + 2], router[expert + 3]
            )
            expert += 4
        while expert < num_experts:
            logits[expert] = _dot(row, router[expert])
            expert += 1
        choose(logits, chosen, gates, scaling)
        update[:] = 0
        for k in range(top_k):
            matrix_A, matrix_B = experts_A[chosen[k]], experts_B[chosen[k]]
            gate = gates[k]
            j = 0
            while j + 4 <= r:  # four rows of B at once: the update is read and written less often
                b0, b1, b2, b3 = matrix_B[j], matrix_B[j + 1], matrix_B[j + 2], matrix_B[j + 3]
                h0, h1, h2, h3 = _dots(row, matrix_A[j], matrix_A[j + 1], matrix_A[j + 2], matrix_A[j + 3])
                h0, h1, h2, h3 = h0 * gate, h1 * gate, h2 * gate, h3 * gate
                for i in range(out_features):
                    update[i] += h0 * widen(b0[i]) + h1 * widen(b1[i]) + h2 * widen(b2[i]) + h3 * widen(b3[i])
                j += 4
            while j < r:
                h0, b0 = _dot(row, matrix_A[j]) * gate, matrix_B[j]
                for i in range(out_features):
                    update[i] += h0 * widen(b0[i])
                j += 1
        for i in range(out_features):
            output[token, i] = narrow(widen(output[token, i]) + update[i], output[token, i])


def _specialize(values: Any, weights: Any) -> Any:
    def add(x, router, experts_A, experts_B, output, num_tokens, num_experts, r, in_features, out_features, s, top_k):
        _add(
            numba.carray(pointer(x), (num_tokens, in_features), values),
            numba.carray(pointer(router), (num_experts, in_features), np.float32),
            numba.carray(pointer(experts_A), (num_experts, r, in_features), weights),
            numba.carray(pointer(experts_B), (num_experts, r, out_features), weights),
            numba.carray(pointer(output), (num_tokens, out_features), values),
            np.float32(s),
            top_k,
        )

    return compiled(add, types.void(*[types.int64] * 10, types.float64, types.int64))


def compiled(function: Any, signature: Any) -> Any:
    """A function compiled for a signature; what was compiled is kept on disk where that is possible."""
    # By the name of the file, since numba looks at the function's own source only, and what it calls is compiled in.
    function.__qualname__ += f"_{_sources_digest()}"
    try:
        return numba.njit(signature, nogil=True, cache=True)(function)
    except (RuntimeError, OSError) as error:  # no folder can be written, or the disk is full
        logger.warning("Compiled code could not be kept on disk and is compiled in every process: %s", error)
        return numba.njit(signature, nogil=True)(function)


@functools.cache
def _sources_digest() -> str:
    """What the sources of all native functions are known by."""
    sources = sorted(Path(__file__).parent.glob("native*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


@functools.cache
def kernel(values: torch.dtype, weights: torch.dtype) -> Any:
    """The native function for number formats; None if there is none.

    Args:
        values: of input and output.
        weights: of A and B; the router is in float32.

    Returns:
        A function of addresses and sizes that adds the update to the base output, in place and without a check:
        `(x, router, experts_A, experts_B, output, num_tokens, num_experts, r, in, out, scaling, top_k)`.
        All tensors contiguous, `1 <= top_k <= num_experts`.
    """
    formats = FORMATS.get(values), FORMATS.get(weights)
    if None in formats or (values, weights) == (torch.float32, torch.bfloat16):  # whose input would be rounded
        return None
    return _specialize(*formats)

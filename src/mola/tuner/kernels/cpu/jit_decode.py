"""Native functions for few tokens: the update of a mixture, the same for rows with different adapters, a linear map.

In operators of torch the update of one linear is some twenty calls, which take longer than its arithmetic, and it reads
the matrices of all experts. The native function chooses a token's experts, reads their matrices only, and adds the
update to the base output, all in one call. It computes in float32.

A function is compiled when it is first used (a few seconds), then kept on disk, next to this file or in numba's cache
folder.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from mola.tuner.kernels.cpu.jit import FORMATS, MATH, choose_experts, compiled, narrow, pointer, widen
from mola.tuner.kernels.cpu.jit_instructions import has_vectors
from mola.tuner.kernels.cpu.jit_vectors import dot_rows, hold

_TOKENS, _ROWS = 8, 3  # multiplied at once by `_linear`; all their sums stay in registers
_AHEAD = 16384  # bytes that `_linear` prefetches ahead; measured with rows of 2 and of 6 KB


@numba.njit(fastmath=MATH, inline="always")
def _dot(a, b):
    """Dot product of a float32 row with a row in any dtype."""
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * widen(b[i])
    return total


@numba.njit(fastmath=MATH, inline="always")
def _dots(a, b0, b1, b2, b3):
    """Dot products of a float32 row with four rows."""
    s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(a)):
        s0 += a[i] * widen(b0[i])
        s1 += a[i] * widen(b1[i])
        s2 += a[i] * widen(b2[i])
        s3 += a[i] * widen(b3[i])
    return s0, s1, s2, s3


@numba.njit(fastmath=MATH, forceinline=True)
def _add(x, router, experts_A, experts_B, output, scaling, top_k):
    """Add the update of a mixture to `output: (N, out)`; the other shapes are as in `kernel`."""
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
        choose_experts(logits, chosen, gates, scaling)
        update[:] = 0
        for k in range(top_k):
            matrix_A, matrix_B = experts_A[chosen[k]], experts_B[chosen[k]]
            gate = gates[k]
            j = 0
            while j + 4 <= r:  # four rows of B at once, so that the update is read and written less often
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
    """Compile `kernel` for the dtypes of input and output, and of A and B."""

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

    return compiled(add, types.void(*[types.int64] * 10, types.float64, types.int64), values, weights)


def _specialize_rows(values: Any, weights: Any) -> Any:
    """Compile `rows_kernel` for the dtypes of input and output, and of A and B."""

    def add_rows(x, output, experts, scalings, num_rows, num_tokens, in_features, out_features):
        all_x = numba.carray(pointer(x), (num_rows, num_tokens, in_features), values)
        all_output = numba.carray(pointer(output), (num_rows, num_tokens, out_features), values)
        table = numba.carray(pointer(experts), (num_rows, 6), np.int64)
        scaling = numba.carray(pointer(scalings), (num_rows,), np.float32)
        for row in range(num_rows):
            num_experts, r, top_k = table[row, 3], table[row, 4], table[row, 5]
            if top_k > 0:
                _add(
                    all_x[row],
                    numba.carray(pointer(table[row, 0]), (num_experts, in_features), np.float32),
                    numba.carray(pointer(table[row, 1]), (num_experts, r, in_features), weights),
                    numba.carray(pointer(table[row, 2]), (num_experts, r, out_features), weights),
                    all_output[row],
                    scaling[row],
                    top_k,
                )

    return compiled(add_rows, types.void(*[types.int64] * 8), values, weights)


@functools.cache
def kernel(values: torch.dtype, weights: torch.dtype) -> Any:
    """The native function that adds the update of a mixture to the base output; None if there is none for the dtypes.

    Args:
        values: dtype of input and output.
        weights: dtype of A and B; the router is in float32.

    Returns:
        A function of addresses and sizes: `(x, router, experts_A, experts_B, output, num_tokens, num_experts, r, in,
        out, scaling, top_k)`. Shapes: `x (N, in)`, `router (E, in)`, `experts_A (E, r, in)`, `experts_B (E, r, out)`,
        `output (N, out)`. It checks nothing; all tensors are contiguous, `1 <= top_k <= num_experts`.
    """
    formats = _formats(values, weights)
    return formats and _specialize(*formats)


@functools.cache
def rows_kernel(values: torch.dtype, weights: torch.dtype) -> Any:
    """Like `kernel`, but for a batch whose rows have different experts.

    Returns:
        A function of addresses and sizes: `(x, output, experts, scalings, num_rows, tokens_per_row, in, out)`.
        Each row of `experts: int64 (num_rows, 6)` holds the addresses of router, A and B, and `num_experts, r, top_k`;
        with `top_k` 0 nothing is added. `scalings: float32 (num_rows,)`.
    """
    formats = _formats(values, weights)
    return formats and _specialize_rows(*formats)


def _formats(values: torch.dtype, weights: torch.dtype) -> Any:
    formats = FORMATS.get(values), FORMATS.get(weights)
    # A float32 input with bfloat16 weights would have to be rounded.
    return None if None in formats or (values, weights) == (torch.float32, torch.bfloat16) else formats


def _linear(x, weight, bias, output, num_tokens, in_features, out_features):
    """Fill `output` with `x W^T + b`, in blocks of eight tokens and three rows of the weight; see `linear_kernel`."""
    padded = (num_tokens + _TOKENS - 1) // _TOKENS * _TOKENS
    tokens = np.zeros((padded, in_features), np.float32)
    tokens[:num_tokens] = numba.carray(pointer(x), (num_tokens, in_features), np.float32)
    by_row = np.empty((out_features + _ROWS, padded), np.float32)
    table = np.empty(_ROWS, np.int64)
    at, first, target, num_bytes = table.ctypes.data, tokens.ctypes.data, by_row.ctypes.data, 4 * in_features
    for row in range(0, out_features, _ROWS):
        for t in range(_ROWS):  # beyond the last row the last row again
            table[t] = weight + min(row + t, out_features - 1) * num_bytes
        for start in range(0, padded, _TOKENS):
            block, place = first + start * num_bytes, target + 4 * (row * padded + start)
            dot_rows(at, block, num_bytes, num_bytes, place, 4 * padded, _AHEAD, _ROWS, _TOKENS, 0)
    hold(table)
    hold(tokens)
    results = numba.carray(pointer(output), (num_tokens, out_features), np.float32)
    added = numba.carray(pointer(bias), out_features if bias else 0, np.float32)
    for n in range(num_tokens):
        result = results[n]
        for row in range(out_features):
            result[row] = by_row[row, n]
        if len(added) > 0:
            result += added


@functools.cache
def linear_kernel() -> Any:
    """The native function for a float32 linear map of few tokens; None on a processor without its vector instructions.

    Such a product takes as long as its weight takes to come from memory. Libraries wait at the beginning of every row;
    this function prefetches the weight.

    Returns:
        A function of addresses and sizes: `(x, weight, bias, output, num_tokens, in, out)`. It fills `output` with
        `x W^T + b`; the address of `bias` may be 0. It checks nothing; all tensors are float32 and contiguous, `in` is
        a multiple of 16.
    """
    return compiled(_linear, types.void(*[types.int64] * 7)) if has_vectors(is_bf16=False) else None

"""A mixture for few tokens as one native function, which numba compiles: the extra `cpu`.

As operators of torch the update of one linear is some twenty calls, which cost more than its arithmetic, and it reads
the matrices of all experts. The function chooses a token's experts, reads their matrices only, and adds the update to
the base output, all in one call. It computes in float32.

It is compiled when first needed (a few seconds), then kept on disk, next to this file or in numba's cache folder.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from mola.tuner.kernels.cpu.jit import FORMATS, MATH, choose, compiled, narrow, pointer, widen


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

    return compiled(add, types.void(*[types.int64] * 10, types.float64, types.int64), values, weights)


def _specialize_rows(values: Any, weights: Any) -> Any:
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
    """The native function for dtypes; None if there is none.

    Args:
        values: of input and output.
        weights: of A and B; the router is in float32.

    Returns:
        A function of addresses and sizes that adds the update to the base output, in place and without a check:
        `(x, router, experts_A, experts_B, output, num_tokens, num_experts, r, in, out, scaling, top_k)`.
        All tensors contiguous, `1 <= top_k <= num_experts`.
    """
    formats = _formats(values, weights)
    return formats and _specialize(*formats)


@functools.cache
def rows_kernel(values: torch.dtype, weights: torch.dtype) -> Any:
    """The same for rows that have experts of their own; dtypes as for `kernel`.

    Returns:
        A function of addresses and sizes: `(x, output, experts, scalings, num_rows, tokens_of_a_row, in, out)`.
        Each row of `experts` has the addresses of router, A and B, and `num_experts, r, top_k`, in 64-bit integers;
        with `top_k` 0 nothing is added.
    """
    formats = _formats(values, weights)
    return formats and _specialize_rows(*formats)


def _formats(values: torch.dtype, weights: torch.dtype) -> Any:
    formats = FORMATS.get(values), FORMATS.get(weights)
    # The input would be rounded in the second case.
    return None if None in formats or (values, weights) == (torch.float32, torch.bfloat16) else formats

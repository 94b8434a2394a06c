"""A linear map of few tokens on one thread, in float32, which asks for its weight ahead of time (numba: extra `cpu`).

A product of few tokens takes as long as its weight takes to come from memory, and libraries read more slowly than
memory can give, as they wait for the lines that rows begin with.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba import types

from mola.tuner.kernels.cpu.jit import compiled, pointer
from mola.tuner.kernels.cpu.jit_instructions import has_vectors
from mola.tuner.kernels.cpu.jit_vectors import dot_rows, hold

_TOKENS, _ROWS = 8, 3  # multiplied at once: as many sums as there are registers for; a single token takes no less time
_AHEAD = 16384  # bytes, chosen with rows of 2 and of 6 KB


def _linear(x, weight, bias, output, num_tokens, in_features, out_features):
    padded = (num_tokens + _TOKENS - 1) // _TOKENS * _TOKENS
    tokens = np.zeros((padded, in_features), np.float32)
    tokens[:num_tokens] = numba.carray(pointer(x), (num_tokens, in_features), np.float32)
    by_row = np.empty((out_features + _ROWS, padded), np.float32)
    table = np.empty(_ROWS, np.int64)
    at, first, target, num_bytes = table.ctypes.data, tokens.ctypes.data, by_row.ctypes.data, 4 * in_features
    for row in range(0, out_features, _ROWS):
        for t in range(_ROWS):  # where rows run out, the last one again
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
def kernel() -> Any:
    """The native function; None on a processor without the vectors it is made of.

    Returns:
        A function of addresses and sizes, without a check, all float32 and contiguous: `(x, weight, bias, output,
        num_tokens, in, out)` fills `output` with `x W^T + b`. The address of a bias may be 0. `in` is a multiple of 16.
    """
    return compiled(_linear, types.void(*[types.int64] * 7)) if has_vectors(in_pairs=False) else None

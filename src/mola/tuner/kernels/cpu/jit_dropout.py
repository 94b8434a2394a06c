"""Dropout as one native function, which computes the mask from a seed wherever it is needed.

Whether element `i` is kept is a function of `i` and a seed of 64 bits, so no mask is stored. The function mixes bits as
the finalizers of hash functions do, by multiplications with odd numbers between shifts. It mixes twice: one half of the
seed is added before the first time, the other half is combined with the result before the second.

Source of the constants: C. Wellons, "Prospecting for hash functions".
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba import types

from mola.tuner.kernels.cpu.jit import compiled, pointer

_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes of a number; zero has zero bits in every dtype


@numba.njit(inline="always")
def _mix_bits(x):
    """Mix the bits of a 32-bit number, so that every bit of the result depends on all bits of `x`."""
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


def _specialize(bits: Any) -> Any:
    """Compile `kernel` for the integer type of an element's bits."""

    def drop(source, seed, target, size):
        numbers, dropped = numba.carray(pointer(source), size, bits), numba.carray(pointer(target), size, bits)
        words = numba.carray(pointer(seed), 3, np.uint32)
        before, between, threshold = words[0], words[1], words[2]
        for i in range(size):
            x = _mix_bits(np.uint32(np.uint32(i) + before))
            x = _mix_bits(np.uint32(x ^ between))
            dropped[i] = numbers[i] if x >= threshold else bits(0)

    return compiled(drop, types.void(*[types.int64] * 4), bits)


@functools.cache
def kernel(itemsize: int) -> Any:
    """The native function for numbers of `itemsize` bytes; None if there is none.

    Returns:
        A function `(source, seed, target, size)` of three addresses and a number of elements. It copies the elements of
        the source that are kept, and writes zeros for the others. The seed has three words of 32 bits: two random ones,
        and the probability of dropping an element times `2**32`.
    """
    return _specialize(_BITS[itemsize]) if itemsize in _BITS else None

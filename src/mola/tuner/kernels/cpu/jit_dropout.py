"""Dropout as one native function, which draws the mask again wherever it is needed: the extra `cpu`.

Whether element `i` is kept is a function of `i` and a seed of 64 bits, so nothing of the mask is stored. The function
mixes bits as the finalizers of hash functions do: multiplications by odd numbers between shifts (constants: C. Wellons,
"Prospecting for hash functions"), twice, with one half of the seed before and the other in between.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba import types

from mola.tuner.kernels.cpu.jit import compiled, pointer

_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # of a number with so many bytes; zero is zero in each


@numba.njit(inline="always")
def _mixed(x):
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


def _specialize(bits: Any) -> Any:
    def drop(source, seed, target, size):
        numbers, dropped = numba.carray(pointer(source), size, bits), numba.carray(pointer(target), size, bits)
        words = numba.carray(pointer(seed), 3, np.uint32)
        before, between, threshold = words[0], words[1], words[2]
        for i in range(size):
            x = _mixed(np.uint32(np.uint32(i) + before))
            x = _mixed(np.uint32(x ^ between))
            dropped[i] = numbers[i] if x >= threshold else bits(0)

    return compiled(drop, types.void(*[types.int64] * 4), bits)


@functools.cache
def kernel(itemsize: int) -> Any:
    """The native function for numbers of so many bytes; None if there is none.

    Returns:
        A function `(source, seed, target, size)` of three addresses and a number of elements, all contiguous. It writes
        those of the source that are kept, and zeros for the others. At the address of the seed are three words of 32
        bits: two are the seed, the third says with which probability an element is dropped, times `2**32`.
    """
    return _specialize(_BITS[itemsize]) if itemsize in _BITS else None

"""Inner loops of small matrix products on vectors of 512 bits, for functions that numba compiles.

Each loop reads rows through a table of their addresses, so the rows may be anywhere in memory:

- `dot_rows`: the products of several rows with several other rows;
- `add_rows`: multiples of several rows, added to one row;
- `outer_rows`: sums of multiples of rows, one sum for every column of coefficients.

Sums are in float32. In bfloat16 one instruction (of AVX-512 BF16) multiplies two pairs of numbers and adds both
products, so rows and coefficients come in pairs. A "lane" of four bytes is one float32 or one such pair. The loops are
written in LLVM's instructions (`jit_instructions`), because compilers do not find them. They check nothing, not even
addresses.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mola.tuner.kernels.cpu import jit_instructions as op

BLOCK = 2 * op.LANES  # columns of one `outer_rows`; the smallest number of columns of `add_rows`


def _dot_rows(typing_context, rows, matrix, stride, num_bytes, sums, sums_stride, ahead, count, width, is_bf16):
    """Set `sums[t, j] = <rows[t], matrix[j]>` for `t < count`, `j < width`.

    `rows` is the address of a table of `count` addresses, `matrix` that of `width` rows, `stride` bytes apart. A row
    has `num_bytes` bytes, a multiple of 64. `sums` is the address of rows of float32 sums, `sums_stride` bytes apart.

    These arguments are constants of the compiled code: `ahead`, the number of bytes to prefetch ahead in `rows` (0: no
    prefetching); `count` and `width`, whose sums all stay in registers up to `count * width = 24`; `is_bf16`, 1 for
    bfloat16 and 0 for float32.
    """

    def generate(context, builder, signature, arguments):
        rows, matrix, stride, num_bytes, sums, sums_stride = arguments[:6]
        totals = [op.zeros(builder, width.literal_value) for _ in range(count.literal_value)]
        left = [op.load_address(builder, rows, op.int64(t)) for t in range(len(totals))]
        distance = ahead.literal_value
        right = [matrix]
        for _ in range(1, width.literal_value):
            right.append(op.shift(builder, right[-1], stride))
        with cgutils.for_range_slice(builder, op.int64(0), num_bytes, op.int64(op.BYTES)) as (offset, _):
            for address in left if distance else ():
                op.prefetch(builder, op.shift(builder, address, offset, distance))
            vectors = [op.load(builder, op.shift(builder, address, offset), op.WORDS) for address in left]
            for j, address in enumerate(right):
                vector = op.load(builder, op.shift(builder, address, offset), op.WORDS)
                for t, other in enumerate(vectors):
                    op.accumulate(builder, is_bf16.literal_value, totals[t][j], other, vector)
        for row in totals:
            values = [builder.load(total) for total in row]
            if len(values) == 8:
                op.store(builder, op.sums_of_eight(builder, values), sums)
            else:
                for j, value in enumerate(values):
                    op.store(builder, op.lane_sum(builder, value), op.shift(builder, sums, 4 * j))
            sums = op.shift(builder, sums, sums_stride)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, ahead, count, width, is_bf16), generate


def _add_rows(typing_context, target, rows, offset, coefficients, count, num_vectors, is_bf16):
    """Add `sum_m coefficients[m] * rows[m]` to `target`, for `16 * num_vectors` columns.

    `target` is the address of the first column, in float32, or in bfloat16 if `is_bf16` is 1. `rows` is the address of
    a table of `count` addresses, to each of which `offset` bytes are added, and `coefficients` that of `count` lanes.
    In bfloat16 each entry of the table is a pair of rows whose columns alternate. `num_vectors` and `is_bf16` are
    constants of the compiled code.
    """

    def generate(context, builder, signature, arguments):
        target, rows, offset, coefficients, count = arguments[:5]
        bf16 = is_bf16.literal_value
        addresses = [
            op.shift(builder, target, (2 if bf16 else 4) * op.LANES * v) for v in range(num_vectors.literal_value)
        ]
        totals = [cgutils.alloca_once_value(builder, op.load_floats(builder, address, bf16)) for address in addresses]
        with cgutils.for_range(builder, count) as loop:
            lane = op.load(builder, op.shift(builder, coefficients, builder.shl(loop.index, op.int64(2))), op.WORD)
            factor = op.broadcast(builder, lane)
            row = op.shift(builder, op.load_address(builder, rows, loop.index), offset)
            for v, total in enumerate(totals):
                op.accumulate(
                    builder, bf16, total, factor, op.load(builder, op.shift(builder, row, op.BYTES * v), op.WORDS)
                )
        for address, total in zip(addresses, totals, strict=True):
            value = builder.load(total)
            if bf16:
                value = op.to_bfloat16(builder, value)
            op.store(builder, value, address)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, num_vectors, is_bf16), generate


# Shuffles that let the columns of two rows alternate, within each quarter of a vector as the processor does at once.
_LOW = [part + 8 * q + i for q in range(4) for i in range(4) for part in (0, 2 * op.LANES)]
_HIGH = [place + 4 for place in _LOW]
# The sums then have columns 0 to 3, 8 to 11, ... and 4 to 7, 12 to 15, ...; these shuffles restore the order.
_FIRST = [*range(4), *range(16, 20), *range(4, 8), *range(20, 24)]
_SECOND = [place + 8 for place in _FIRST]


def _outer_rows(typing_context, rows, offset, coefficients, stride, count, targets, targets_offset, width, is_bf16):
    """Set `targets[j] = sum_m coefficients[m, j] * rows[m]` for `j < width`, for 32 columns.

    `rows` is the address of a table of addresses, to each of which `offset` bytes are added: `count` rows, or `count`
    pairs of rows if `is_bf16` is 1. `coefficients` is the address of rows of lanes, `stride` bytes apart. `targets` is
    the address of a table of `width` addresses of float32 numbers, to each of which `targets_offset` bytes are added.
    `width` (at most 9) and `is_bf16` are constants of the compiled code.
    """

    def generate(context, builder, signature, arguments):
        rows, offset, coefficients, stride, count, targets, targets_offset = arguments[:7]
        bf16 = is_bf16.literal_value
        totals = [op.zeros(builder, 2) for _ in range(width.literal_value)]
        with cgutils.for_range(builder, count) as loop:
            vectors = _two_vectors(builder, rows, loop.index, offset, bf16)
            lanes = op.shift(builder, coefficients, builder.mul(loop.index, stride))
            for j, row in enumerate(totals):
                factor = op.broadcast(builder, op.load(builder, op.shift(builder, lanes, 4 * j), op.WORD))
                for total, vector in zip(row, vectors, strict=True):
                    op.accumulate(builder, bf16, total, factor, vector)
        for j, row in enumerate(totals):
            first, second = (builder.load(total) for total in row)
            if bf16:
                first, second = (op.shuffle(builder, first, second, order) for order in (_FIRST, _SECOND))
            place = op.shift(builder, op.load_address(builder, targets, op.int64(j)), targets_offset)
            op.store(builder, first, place)
            op.store(builder, second, op.shift(builder, place, op.BYTES))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, width, is_bf16), generate


def _two_vectors(builder, rows, index, offset, is_bf16):
    if not is_bf16:
        row = op.shift(builder, op.load_address(builder, rows, index), offset)
        return [op.load(builder, row, op.WORDS), op.load(builder, op.shift(builder, row, op.BYTES), op.WORDS)]
    twice = builder.shl(index, op.int64(1))
    addresses = op.load_address(builder, rows, twice), op.load_address(builder, rows, op.shift(builder, twice, 1))
    one, other = (op.load(builder, op.shift(builder, address, offset), op.PAIRS, 2) for address in addresses)
    return [builder.bitcast(op.shuffle(builder, one, other, order), op.WORDS) for order in (_LOW, _HIGH)]


def _hold(typing_context, array):
    """Keep an array alive until here: numba frees an array after the last use of its name, not of its address."""
    return types.void(array), lambda context, builder, signature, arguments: context.get_dummy_value()


dot_rows: Any = intrinsic(prefer_literal=True)(_dot_rows)
add_rows: Any = intrinsic(prefer_literal=True)(_add_rows)
outer_rows: Any = intrinsic(prefer_literal=True)(_outer_rows)
hold: Any = intrinsic(_hold)

"""Products of tokens with the rows of their experts, of which `mola.tuner.kernels.cpu.jit_train` consists.

Assignments of tokens to experts are sorted by expert. Rows of tokens come as a table of addresses in that order.
`pairs` is 1 in bfloat16, where two rows share a lane of four bytes (a `group`), else 0. `whole` and `rest` say how many
times eight rows there are, and how many more; they, `pairs` and `group` are constants of what is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from mola.tuner.kernels.cpu.jit import narrow, widen
from mola.tuner.kernels.cpu.jit_vectors import BLOCK, add_rows, dot_rows, hold, outer_rows

WIDE = 4 * BLOCK  # columns that are added to at once: the rows of eight experts for as many fit the first cache
_AT_ONCE = 3  # tokens that are multiplied with eight rows at once: as many sums as there are registers for


class Order(NamedTuple):
    """Assignments sorted by expert. One has a slot, `n * top_k + k`, and a place in this order.

    Attributes:
        starts: where the places of each expert begin, a multiple of the group, `(E + 1,)`.
        counts: how many it has, `(E,)`; places beyond, up to a multiple of the group, are filled with its last slot.
        slots: slot at every place.
        places: place of every slot.
    """

    starts: Any
    counts: Any
    slots: Any
    places: Any


@numba.njit(forceinline=True)
def sort_by_expert(expert_indices, num_experts, group):
    """`Order` of `expert_indices: (top_k, N)`."""
    top_k, num_tokens = expert_indices.shape
    starts, counts = np.empty(num_experts + 1, np.int64), np.zeros(num_experts, np.int64)
    slots = np.empty(top_k * num_tokens + (group - 1) * num_experts, np.int64)
    places = np.empty(top_k * num_tokens, np.int64)
    for k in range(top_k):
        for n in range(num_tokens):
            counts[expert_indices[k, n]] += 1
    place = 0
    for expert in range(num_experts):
        starts[expert] = place
        place += (counts[expert] + group - 1) // group * group
    starts[num_experts] = place
    following = starts.copy()
    for n in range(num_tokens):
        for k in range(top_k):
            expert = expert_indices[k, n]
            slots[following[expert]] = n * top_k + k
            places[n * top_k + k] = following[expert]
            following[expert] += 1
    for expert in range(num_experts):
        for filled in range(following[expert], starts[expert + 1]):
            slots[filled] = slots[following[expert] - 1]
    return Order(starts, counts, slots, places)


@numba.njit(forceinline=True)
def rows_by_place(order, top_k, first, stride):
    """The address of the token's row at every place."""
    table = np.empty(order.starts[-1], np.int64)
    for place in range(len(table)):
        table[place] = first + order.slots[place] // top_k * stride
    return table


@numba.njit(forceinline=True)
def _by_place(values, order, rows, group):
    """`values: (slots, at least rows)` by place, `(places / group, rows, group)`; 0 at places that are filled up."""
    lanes = np.empty((order.starts[-1] // group, rows, group), values.dtype)
    for expert in range(len(order.counts)):
        for place in range(order.starts[expert], order.starts[expert + 1]):
            real = place < order.starts[expert] + order.counts[expert]
            for j in range(rows):
                value = values[order.slots[place], j] if real else values.dtype.type(0)
                lanes[place // group, j, place % group] = value
    return lanes


@numba.njit(inline="always")
def aligned(memory):
    """The first address in `memory`, which has 64 bytes to spare, where a line of the cache begins."""
    return (memory.ctypes.data + 63) // 64 * 64


@numba.njit(forceinline=True)
def round_to(source, target):
    """Numbers in another format."""
    for i in range(source.size):
        target[i] = narrow(widen(source[i]), target[i])


@numba.njit(inline="always")
def multiply(table, order, matrices, num_bytes, sums, r, whole, rest, pairs):
    """`sums[place, j]`: products of every token with the `r` rows of its expert's matrix."""
    at = table.ctypes.data
    for expert in range(len(order.counts)):
        place, end = order.starts[expert], order.starts[expert] + order.counts[expert]
        while place < end:
            rows, matrix = at + 8 * place, matrices + expert * r * num_bytes
            target = sums.ctypes.data + 4 * r * place
            several = place + _AT_ONCE <= end
            for _ in range(whole):
                if several:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 0, _AT_ONCE, 8, pairs)
                else:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 0, 1, 8, pairs)
                matrix += 8 * num_bytes
                target += 32
            if whole * 8 < r:
                if several:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 0, _AT_ONCE, rest, pairs)
                else:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 0, 1, rest, pairs)
            place += _AT_ONCE if several else 1
    hold(table)


@numba.njit(forceinline=True)
def pack(matrices, extra, packed, group):
    """Rows of all experts, and one of `extra` below those of each where there is, as `add_to_tokens` reads them.

    By blocks of columns: `packed: (blocks, E * lanes, WIDE * group)`, where two rows take turns if `group` is 2.
    """
    num_experts, r, features = matrices.shape
    rows = r + (len(extra) > 0)
    lanes = (rows + group - 1) // group
    for block in range(len(packed)):
        start = block * WIDE
        width = min(WIDE, features - start)
        for expert in range(num_experts):
            for j in range(lanes * group):
                target = packed[block, expert * lanes + j // group]
                part = j % group
                if j < r:
                    row = matrices[expert, j, start : start + width]
                    for i in range(width):
                        target[i * group + part] = narrow(widen(row[i]), target[0])
                elif j < rows:
                    of_extra = extra[expert, start : start + width]
                    for i in range(width):
                        target[i * group + part] = narrow(of_extra[i], target[0])
                else:
                    for i in range(width):
                        target[i * group + part] = 0


@numba.njit(inline="always")
def add_to_tokens(total, itemsize, num_tokens, features, expert_indices, packed, lanes, coefficients, pairs):
    """Add to every token the rows of its experts times its coefficients, `(N, top_k * lanes)` lanes of four bytes."""
    top_k = len(expert_indices)
    num_experts_lanes = packed.shape[1]
    first, line = packed.ctypes.data, 4 * WIDE
    count = top_k * lanes
    table = np.empty(num_tokens * count, np.int64)
    for n in range(num_tokens):
        for k in range(top_k):
            for lane in range(lanes):
                table[n * count + k * lanes + lane] = first + (expert_indices[k, n] * lanes + lane) * line
    at = table.ctypes.data
    for start in range(0, features, WIDE):
        offset = start // WIDE * num_experts_lanes * line
        for n in range(num_tokens):
            target = total + (n * features + start) * itemsize
            rows, factors = at + 8 * count * n, coefficients + 4 * count * n
            if features - start >= WIDE:
                add_rows(target, rows, offset, factors, count, 8, pairs)
            else:
                for part in range(0, features - start, BLOCK):
                    add_rows(target + part * itemsize, rows, offset + 4 * part, factors, count, 2, pairs)
    hold(table)


@numba.njit(inline="always")
def sum_outer(values, table, order, features, itemsize, targets, rows, whole, rest, group, pairs):
    """`targets[expert, j] = sum over its tokens of values[slot, j] * row`: `targets` are addresses, `(E * rows,)`."""
    by_place = _by_place(values, order, rows, group)
    at, out, coefficients = table.ctypes.data, targets.ctypes.data, by_place.ctypes.data
    for expert in range(len(order.counts)):
        start_of_expert = order.starts[expert]
        count = (order.starts[expert + 1] - start_of_expert) // group
        first = coefficients + start_of_expert // group * rows * 4
        of_expert = at + 8 * start_of_expert
        for start in range(0, features, BLOCK):
            lanes, places = first, out + 8 * expert * rows
            for _ in range(whole):
                outer_rows(of_expert, start * itemsize, lanes, 4 * rows, count, places, 4 * start, 8, pairs)
                lanes += 32
                places += 64
            if whole * 8 < rows:
                outer_rows(of_expert, start * itemsize, lanes, 4 * rows, count, places, 4 * start, rest, pairs)
    hold(by_place)
    hold(table)
    hold(targets)


def split(rows: int) -> tuple[int, int]:
    """How many times eight rows, and how many more; one more is taken with eight."""
    whole, rest = divmod(rows, 8)
    return (whole - 1, 9) if rest == 1 and whole else (whole, rest or 1)

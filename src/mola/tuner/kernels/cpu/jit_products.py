"""Products of tokens with the matrices of their experts, from which `mola.tuner.kernels.cpu.jit_train` is built.

Assignments of tokens to experts are sorted by expert. The rows of the tokens are read in place, through a table of
their addresses in sorted order.

In bfloat16 two rows share a lane of four bytes, see `jit_vectors`. These arguments are constants of the compiled code:

- `is_bf16`: 1 if the products are in bfloat16, 0 in float32.
- `pack`: rows in a lane, `1 + is_bf16`.
- `full_tiles`, `tail`: a matrix is multiplied in full tiles of eight rows and one tile of `tail` rows, see
  `tiles_of_eight`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from mola.tuner.kernels.cpu.jit import narrow, widen
from mola.tuner.kernels.cpu.jit_vectors import BLOCK, add_rows, dot_rows, hold, outer_rows

WIDE = 4 * BLOCK  # columns that are added to at once; this part of eight experts' rows fits the first cache
_TOKENS = 3  # tokens that are multiplied with eight rows at once; all their sums stay in registers


class ExpertSort(NamedTuple):
    """Assignments of tokens to experts, sorted by expert. Choice `k` of token `n` is assignment `n * top_k + k`.

    Attributes:
        starts: where the sorted assignments of each expert begin, a multiple of `pack`, `(E + 1,)`.
        counts: number of assignments of each expert, `(E,)`. The places beyond, up to a multiple of `pack`, repeat its
            last assignment.
        permutation: the assignment at every sorted place.
        inverse: the sorted place of every assignment, `(N * top_k,)`.
    """

    starts: Any
    counts: Any
    permutation: Any
    inverse: Any


@numba.njit(forceinline=True)
def sort_by_expert(expert_indices, num_experts, pack):
    """The `ExpertSort` of `expert_indices: (top_k, N)`."""
    top_k, num_tokens = expert_indices.shape
    starts, counts = np.empty(num_experts + 1, np.int64), np.zeros(num_experts, np.int64)
    permutation = np.empty(top_k * num_tokens + (pack - 1) * num_experts, np.int64)
    inverse = np.empty(top_k * num_tokens, np.int64)
    for k in range(top_k):
        for n in range(num_tokens):
            counts[expert_indices[k, n]] += 1
    place = 0
    for expert in range(num_experts):
        starts[expert] = place
        place += (counts[expert] + pack - 1) // pack * pack
    starts[num_experts] = place
    following = starts.copy()
    for n in range(num_tokens):
        for k in range(top_k):
            expert = expert_indices[k, n]
            permutation[following[expert]] = n * top_k + k
            inverse[n * top_k + k] = following[expert]
            following[expert] += 1
    for expert in range(num_experts):
        for padding in range(following[expert], starts[expert + 1]):
            permutation[padding] = permutation[following[expert] - 1]
    return ExpertSort(starts, counts, permutation, inverse)


@numba.njit(forceinline=True)
def sorted_row_addresses(sort, top_k, first, stride):
    """The address of the token's row at every sorted place; token `n` has the row at `first + n * stride`."""
    table = np.empty(sort.starts[-1], np.int64)
    for place in range(len(table)):
        table[place] = first + sort.permutation[place] // top_k * stride
    return table


@numba.njit(forceinline=True)
def _sorted_lanes(values, sort, rows, pack):
    """The first `rows` of `values: (assignments, at least rows)` in sorted order, `(places / pack, rows, pack)`.

    0 at places that only fill up an expert's assignments to a multiple of `pack`.
    """
    lanes = np.empty((sort.starts[-1] // pack, rows, pack), values.dtype)
    for expert in range(len(sort.counts)):
        for place in range(sort.starts[expert], sort.starts[expert + 1]):
            real = place < sort.starts[expert] + sort.counts[expert]
            for j in range(rows):
                value = values[sort.permutation[place], j] if real else values.dtype.type(0)
                lanes[place // pack, j, place % pack] = value
    return lanes


@numba.njit(inline="always")
def aligned(memory):
    """The first address in `memory` at which a cache line begins; `memory` has 64 bytes to spare."""
    return (memory.ctypes.data + 63) // 64 * 64


@numba.njit(forceinline=True)
def round_to(source, target):
    """Fill `target` with the numbers of `source`, rounded to the dtype of `target`."""
    for i in range(source.size):
        target[i] = narrow(widen(source[i]), target[i])


@numba.njit(inline="always")
def multiply(table, sort, matrices, num_bytes, sums, r, full_tiles, tail, is_bf16):
    """Fill `sums[place, j]`, in float32, with the product of the token at `place` and row `j` of its expert's matrix.

    `table` has the addresses of the tokens' rows from `sorted_row_addresses`; `matrices` is the address of the experts'
    matrices `(E, r, features)`, whose rows have `num_bytes` bytes. The module explains `full_tiles`, `tail`, `is_bf16`.
    """
    at = table.ctypes.data
    for expert in range(len(sort.counts)):
        place, end = sort.starts[expert], sort.starts[expert] + sort.counts[expert]
        while place < end:
            rows, matrix = at + 8 * place, matrices + expert * r * num_bytes
            target = sums.ctypes.data + 4 * r * place
            several = place + _TOKENS <= end
            for _ in range(full_tiles):
                if several:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 0, _TOKENS, 8, is_bf16)
                else:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 0, 1, 8, is_bf16)
                matrix += 8 * num_bytes
                target += 32
            if full_tiles * 8 < r:
                if several:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 0, _TOKENS, tail, is_bf16)
                else:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 0, 1, tail, is_bf16)
            place += _TOKENS if several else 1
    hold(table)


@numba.njit(forceinline=True)
def pack_rows(matrices, extra, packed, pack):
    """Copy the rows of all experts, `matrices: (E, r, features)`, into the layout that `add_to_tokens` reads.

    `extra: (E, features)` has one more row for each expert, below its own; `(0, features)` for none. The result is
    `packed: (blocks of columns, E * lanes, WIDE * pack)`; if `pack` is 2 (bfloat16), the columns of two rows alternate.
    """
    num_experts, r, features = matrices.shape
    rows = r + (len(extra) > 0)
    lanes = (rows + pack - 1) // pack
    for block in range(len(packed)):
        start = block * WIDE
        width = min(WIDE, features - start)
        for expert in range(num_experts):
            for j in range(lanes * pack):
                target = packed[block, expert * lanes + j // pack]
                part = j % pack
                if j < r:
                    row = matrices[expert, j, start : start + width]
                    for i in range(width):
                        target[i * pack + part] = narrow(widen(row[i]), target[0])
                elif j < rows:
                    extra_row = extra[expert, start : start + width]
                    for i in range(width):
                        target[i * pack + part] = narrow(extra_row[i], target[0])
                else:
                    for i in range(width):
                        target[i * pack + part] = 0


@numba.njit(inline="always")
def add_to_tokens(total, itemsize, num_tokens, features, expert_indices, packed, lanes, coefficients, is_bf16):
    """Add to the row of every token the rows of its experts, each times a coefficient.

    `total` is the address of the tokens' rows `(N, features)`, whose numbers have `itemsize` bytes. `packed` is the
    result of `pack_rows`, with `lanes` rows for each expert; `expert_indices: (top_k, N)`. `coefficients` is the
    address of `(N, top_k * lanes)` lanes of four bytes. `is_bf16` is 1 if the products are in bfloat16.
    """
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
                add_rows(target, rows, offset, factors, count, 8, is_bf16)
            else:
                for part in range(0, features - start, BLOCK):
                    add_rows(target + part * itemsize, rows, offset + 4 * part, factors, count, 2, is_bf16)
    hold(table)


@numba.njit(inline="always")
def sum_outer(values, table, sort, features, itemsize, targets, rows, full_tiles, tail, pack, is_bf16):
    """Fill row `j` of every expert with the sum over its assignments of `values[assignment, j]` times the token's row.

    `values` is `(assignments, at least rows)`. `table` has the addresses of the tokens' rows, from
    `sorted_row_addresses`; a row has `features` numbers of `itemsize` bytes. `targets: (E * rows,)` has the addresses
    of the float32 rows to fill. The module explains `full_tiles`, `tail`, `pack` and `is_bf16`.
    """
    sorted_values = _sorted_lanes(values, sort, rows, pack)
    at, out, coefficients = table.ctypes.data, targets.ctypes.data, sorted_values.ctypes.data
    for expert in range(len(sort.counts)):
        start_of_expert = sort.starts[expert]
        count = (sort.starts[expert + 1] - start_of_expert) // pack
        first = coefficients + start_of_expert // pack * rows * 4
        rows_of_expert = at + 8 * start_of_expert
        for start in range(0, features, BLOCK):
            lanes, addresses = first, out + 8 * expert * rows
            for _ in range(full_tiles):
                outer_rows(rows_of_expert, start * itemsize, lanes, 4 * rows, count, addresses, 4 * start, 8, is_bf16)
                lanes += 32
                addresses += 64
            if full_tiles * 8 < rows:
                outer_rows(
                    rows_of_expert, start * itemsize, lanes, 4 * rows, count, addresses, 4 * start, tail, is_bf16
                )
    hold(sorted_values)
    hold(table)
    hold(targets)


def tiles_of_eight(rows: int) -> tuple[int, int]:
    """Number of full tiles of eight rows, and rows of the last tile; a single row joins the tile before it."""
    full_tiles, tail = divmod(rows, 8)
    return (full_tiles - 1, 9) if tail == 1 and full_tiles else (full_tiles, tail or 1)

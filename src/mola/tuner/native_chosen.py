"""A mixture of many tokens and its gradient as two native functions, which read chosen experts only.

Assignments of tokens to experts are sorted by expert. What A gives, and what comes back through B, are products of an
expert's tokens with its rows, where they lie: nothing is gathered. What is added to a token comes from all its experts
at once. So arithmetic does not grow with the number of experts, and the base output is read and written once.

Sums are in float32. Where products are in bfloat16, A, B and what lies between are rounded to it, as they are in
operators of torch; rows then come in pairs, which share a lane of four bytes (`mola.tuner.native_vectors`).
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from mola.tuner.native import FORMATS, MATH, choose, compiled, narrow, pointer, widen
from mola.tuner.native_routing import router_logits
from mola.tuner.native_vectors import BLOCK, add_rows, dot_rows, has_vectors, hold, outer_rows

_WIDE = 4 * BLOCK  # columns that are added to at once: the rows of eight experts for as many fit the first cache
_AT_ONCE = 3  # tokens that are multiplied with eight rows at once: as many sums as there are registers for


@numba.njit(inline="always")
def _aligned(memory):
    """The first address in `memory`, which has 64 bytes to spare, where a line of the cache begins."""
    return (memory.ctypes.data + 63) // 64 * 64


# ---------------------------------------------------------------- who visits whom


@numba.njit(fastmath=MATH, forceinline=True)
def _choose(logits, weights, expert_indices, scaling):
    num_experts, num_tokens = logits.shape
    top_k = len(expert_indices)
    of_token = np.empty(num_experts, np.float32)
    chosen = np.empty(top_k, np.int64)
    gates = np.empty(top_k, np.float32)
    for n in range(num_tokens):
        for expert in range(num_experts):
            of_token[expert] = logits[expert, n]
        choose(of_token, chosen, gates, scaling)
        for k in range(top_k):
            expert_indices[k, n] = chosen[k]
            weights[k, n] = gates[k]


@numba.njit(forceinline=True)
def _sort(expert_indices, starts, counts, slots, places, group):
    """Sort assignments by expert; those of each begin at a multiple of `group` and are filled up with the last one.

    An assignment has a slot, `n * top_k + k`, and a place in the order of experts; each table gives one by the other.
    """
    top_k, num_tokens = expert_indices.shape
    counts[:] = 0
    for k in range(top_k):
        for n in range(num_tokens):
            counts[expert_indices[k, n]] += 1
    place = 0
    for expert in range(len(counts)):
        starts[expert] = place
        place += (counts[expert] + group - 1) // group * group
    starts[len(counts)] = place
    following = starts.copy()
    for n in range(num_tokens):
        for k in range(top_k):
            expert = expert_indices[k, n]
            slots[following[expert]] = n * top_k + k
            places[n * top_k + k] = following[expert]
            following[expert] += 1
    for expert in range(len(counts)):
        for filled in range(following[expert], starts[expert + 1]):
            slots[filled] = slots[following[expert] - 1]


@numba.njit(forceinline=True)
def _addresses(slots, count, top_k, first, stride):
    """The row of the token at every place."""
    table = np.empty(count, np.int64)
    for place in range(count):
        table[place] = first + slots[place] // top_k * stride
    return table


# ---------------------------------------------------------------- products


@numba.njit(forceinline=True)
def _round(source, target):
    for i in range(source.size):
        target[i] = narrow(widen(source[i]), target[i])


@numba.njit(inline="always")
def _multiply(table, starts, counts, matrices, num_bytes, sums, r, whole, rest, pairs):
    """`sums[place, j]`: what the tokens of every expert have in common with the rows of its matrix."""
    at = table.ctypes.data
    for expert in range(len(counts)):
        place, end = starts[expert], starts[expert] + counts[expert]
        while place < end:
            rows, matrix = at + 8 * place, matrices + expert * r * num_bytes
            target = sums + 4 * r * place
            several = place + _AT_ONCE <= end
            for _ in range(whole):
                if several:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 3, 8, pairs)
                else:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 1, 8, pairs)
                matrix += 8 * num_bytes
                target += 32
            if whole * 8 < r:
                if several:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 3, rest, pairs)
                else:
                    dot_rows(rows, matrix, num_bytes, num_bytes, target, 4 * r, 1, rest, pairs)
            place += _AT_ONCE if several else 1
    hold(table)


@numba.njit(forceinline=True)
def _pack(matrices, extra, packed, group):
    """Rows of all experts, and one of `extra` below those of each where there is, by blocks of columns: `_add` reads it.

    `packed: (blocks, E * lanes, _WIDE * group)`, where pairs of rows take turns if `group` is 2.
    """
    num_experts, r, features = matrices.shape
    rows = r + (len(extra) > 0)
    lanes = (rows + group - 1) // group
    for block in range(len(packed)):
        start = block * _WIDE
        width = min(_WIDE, features - start)
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
def _add(total, itemsize, num_tokens, features, expert_indices, packed, lanes, coefficients, pairs):
    """Add to every token the rows of its experts times its coefficients, `(N, top_k * lanes)` lanes of four bytes."""
    top_k = len(expert_indices)
    num_experts_lanes = packed.shape[1]
    first, line = packed.ctypes.data, 4 * _WIDE
    count = top_k * lanes
    table = np.empty(num_tokens * count, np.int64)
    for n in range(num_tokens):
        for k in range(top_k):
            for lane in range(lanes):
                table[n * count + k * lanes + lane] = first + (expert_indices[k, n] * lanes + lane) * line
    at = table.ctypes.data
    for start in range(0, features, _WIDE):
        offset = start // _WIDE * num_experts_lanes * line
        for n in range(num_tokens):
            target = total + (n * features + start) * itemsize
            rows, factors = at + 8 * count * n, coefficients + 4 * count * n
            if features - start >= _WIDE:
                add_rows(target, rows, offset, factors, count, 8, pairs)
            else:
                for part in range(0, features - start, BLOCK):
                    add_rows(target + part * itemsize, rows, offset + 4 * part, factors, count, 2, pairs)
    hold(table)
    hold(packed)


@numba.njit(inline="always")
def _sum_outer(table, starts, coefficients, features, itemsize, targets, rows, whole, rest, group, pairs):
    """`targets[expert, j] = sum over its places of coefficients[place, j] * row`."""
    at, out = table.ctypes.data, targets.ctypes.data
    for expert in range(len(starts) - 1):
        count = (starts[expert + 1] - starts[expert]) // group
        first = coefficients + starts[expert] // group * rows * 4
        of_expert = at + 8 * starts[expert]
        for start in range(0, features, BLOCK):
            lanes, places = first, out + 8 * expert * rows
            for _ in range(whole):
                outer_rows(of_expert, start * itemsize, lanes, 4 * rows, count, places, 4 * start, 8, pairs)
                lanes += 32
                places += 64
            if whole * 8 < rows:
                outer_rows(of_expert, start * itemsize, lanes, 4 * rows, count, places, 4 * start, rest, pairs)
    hold(table)
    hold(targets)


@numba.njit(forceinline=True)
def _by_place(values, slots, starts, counts, lanes, group):
    """`values: (slots, at least rows)` in the order of places, `lanes: (places / group, rows, group)`; 0 where filled up."""
    rows = lanes.shape[1]
    for expert in range(len(counts)):
        for place in range(starts[expert], starts[expert + 1]):
            real = place < starts[expert] + counts[expert]
            for j in range(rows):
                lanes[place // group, j, place % group] = values[slots[place], j] if real else values.dtype.type(0)


# ---------------------------------------------------------------- forward and backward


@numba.njit(fastmath=MATH, forceinline=True)
def _apply_weights(sums, weights, slots, starts, counts, gated):
    top_k, r, padded = len(weights), sums.shape[1], gated.shape[1]
    for expert in range(len(counts)):
        for place in range(starts[expert], starts[expert] + counts[expert]):
            slot = slots[place]
            weight = weights[slot % top_k, slot // top_k]
            for j in range(r):
                gated[slot, j] = narrow(sums[place, j] * weight, gated[slot, j])
            for j in range(r, padded):
                gated[slot, j] = 0


@numba.njit(fastmath=MATH, forceinline=True)
def _through_weights(sums, gated, weights, expert_indices, places, grad_logits, inner, inner_logits, scaling):
    """Gradients of what A gives and of the router logits: see `mola.tuner.gates.through_gates`."""
    top_k, num_tokens = weights.shape
    r = sums.shape[1]
    agreement = np.empty(top_k, np.float32)
    per_gate = np.float32(1.0) / scaling
    for n in range(num_tokens):
        mean = np.float32(0)
        for k in range(top_k):
            slot = n * top_k + k
            through, forward, target, weight = sums[places[slot]], gated[slot], inner[slot], weights[k, n]
            total = np.float32(0)
            for j in range(r):
                total += through[j] * widen(forward[j])
                target[j] = narrow(through[j] * weight, target[j])
            for j in range(r, len(target)):
                target[j] = 0
            agreement[k] = total
            mean += total
        for k in range(top_k):
            value = agreement[k] - weights[k, n] * per_gate * mean
            if len(inner_logits) > 0:
                expert = expert_indices[k, n]
                asked = grad_logits[expert, n] if len(grad_logits) > 0 else np.float32(0)
                inner_logits[expert, n] = narrow(value + asked, inner_logits[expert, n])
            else:
                slot = n * top_k + k
                inner[slot, r] = narrow(value, inner[slot, r])


@numba.njit(forceinline=True)
def _ask(asked, inner_logits):
    for expert in range(len(inner_logits)):
        for n in range(inner_logits.shape[1]):
            value = asked[expert, n] if len(asked) > 0 else np.float32(0)
            inner_logits[expert, n] = narrow(value, inner_logits[expert, n])


def _split(rows: int) -> tuple[int, int]:
    """How many times eight rows, and how many more; one more is taken with eight."""
    whole, rest = divmod(rows, 8)
    return (whole - 1, 9) if rest == 1 and whole else (whole, rest or 1)


def _specialize_forward(values: Any, products: Any, params: Any, r: int) -> Any:
    pairs, itemsize = (1, 2) if products is np.uint16 else (0, 4)
    group, whole, rest = 1 + pairs, r // 8, r % 8 or 1
    lanes = (r + pairs) // group
    rounds = params is not products

    def forward(x, inputs, router, experts_A, experts_B, output, logits, weights, indices, gated, n, i, o, e, top_k, s):
        all_logits = numba.carray(pointer(logits), (e, n), np.float32)
        all_weights = numba.carray(pointer(weights), (top_k, n), np.float32)
        expert_indices = numba.carray(pointer(indices), (top_k, n), np.int64)
        all_gated = numba.carray(pointer(gated), (n * top_k, lanes * group), products)
        matrices_B = numba.carray(pointer(experts_B), (e, r, o), params)
        of_router = numba.carray(pointer(router), (e, i), np.float32)
        router_logits(numba.carray(pointer(x), (n, i), values), of_router, all_logits)
        _choose(all_logits, all_weights, expert_indices, np.float32(s))
        starts, counts = np.empty(e + 1, np.int64), np.empty(e, np.int64)
        slots, places = np.empty(n * top_k, np.int64), np.empty(n * top_k, np.int64)
        _sort(expert_indices, starts, counts, slots, places, 1)
        memory = np.empty(e * r * i * itemsize + 64 if rounds else 0, np.uint8)
        matrices = experts_A
        if rounds:
            matrices = _aligned(memory)
            size = e * r * i
            _round(numba.carray(pointer(experts_A), size, params), numba.carray(pointer(matrices), size, products))
        sums = np.empty((n * top_k, r), np.float32)
        table = _addresses(slots, starts[e], top_k, inputs, i * itemsize)
        _multiply(table, starts, counts, matrices, i * itemsize, sums.ctypes.data, r, whole, rest, pairs)
        _apply_weights(sums, all_weights, slots, starts, counts, all_gated)
        hold(memory)
        blocks = (o + _WIDE - 1) // _WIDE
        memory_B = np.empty(blocks * e * lanes * _WIDE * 4 + 64, np.uint8)
        packed = numba.carray(pointer(_aligned(memory_B)), (blocks, e * lanes, _WIDE * group), products)
        _pack(matrices_B, of_router[:0], packed, group)
        _add(output, itemsize, n, o, expert_indices, packed, lanes, gated, pairs)
        hold(memory_B)

    return compiled(forward, types.void(*[types.int64] * 15, types.float64))


def _specialize_backward(products: Any, params: Any, r: int, joint: bool) -> Any:
    pairs, itemsize = (1, 2) if products is np.uint16 else (0, 4)
    group, whole, rest = 1 + pairs, r // 8, r % 8 or 1
    rows_A = r + joint  # with a row for the router where it reads the same input
    lanes_B, lanes_A = (r + pairs) // group, (rows_A + pairs) // group
    (whole_B, rest_B), (whole_A, rest_A) = _split(r), _split(rows_A)
    rounds = params is not products

    def backward(dy, inputs, gated, weights, indices, asked, experts_A, experts_B, router,
                 total, grad_A, grad_B, grad_router, grad_logits, n, i, o, e, top_k, s):  # fmt: skip
        all_weights = numba.carray(pointer(weights), (top_k, n), np.float32)
        expert_indices = numba.carray(pointer(indices), (top_k, n), np.int64)
        all_gated = numba.carray(pointer(gated), (n * top_k, lanes_B * group), products)
        all_asked = numba.carray(pointer(asked), (e if asked else 0, n), np.float32)
        starts, counts = np.empty(e + 1, np.int64), np.empty(e, np.int64)
        slots, places = np.empty(n * top_k + e, np.int64), np.empty(n * top_k, np.int64)
        _sort(expert_indices, starts, counts, slots, places, group)
        memory = np.empty(e * r * o * itemsize + 64 if rounds else 0, np.uint8)
        matrices = experts_B
        if rounds:
            matrices = _aligned(memory)
            size = e * r * o
            _round(numba.carray(pointer(experts_B), size, params), numba.carray(pointer(matrices), size, products))
        sums = np.empty((starts[e], r), np.float32)
        table = _addresses(slots, starts[e], top_k, dy, o * itemsize)
        _multiply(table, starts, counts, matrices, o * itemsize, sums.ctypes.data, r, whole, rest, pairs)
        hold(memory)
        inner = np.empty((n * top_k, lanes_A * group), products)
        inner_logits = numba.carray(pointer(grad_logits), (0 if joint else e, n), products)
        _ask(all_asked, inner_logits)
        _through_weights(
            sums, all_gated, all_weights, expert_indices, places, all_asked, inner, inner_logits, np.float32(s)
        )
        if grad_B:
            lanes = np.empty((starts[e] // group, r, group), products)
            _by_place(all_gated, slots, starts, counts, lanes, group)
            targets = np.empty(e * r, np.int64)
            for row in range(e * r):
                targets[row] = grad_B + 4 * row * o
            _sum_outer(
                table, starts, lanes.ctypes.data, o, itemsize, targets, r, whole_B, rest_B, group, pairs
            )
            hold(lanes)
        if grad_A:
            lanes = np.empty((starts[e] // group, rows_A, group), products)
            _by_place(inner, slots, starts, counts, lanes, group)
            targets = np.empty(e * rows_A, np.int64)
            for expert in range(e):
                for j in range(r):
                    targets[expert * rows_A + j] = grad_A + 4 * (expert * r + j) * i
                if joint:
                    targets[expert * rows_A + r] = grad_router + 4 * expert * i
            table = _addresses(slots, starts[e], top_k, inputs, i * itemsize)
            _sum_outer(
                table, starts, lanes.ctypes.data, i, itemsize, targets, rows_A, whole_A, rest_A, group, pairs
            )
            hold(lanes)
        if total:
            blocks = (i + _WIDE - 1) // _WIDE
            memory_A = np.empty(blocks * e * lanes_A * _WIDE * 4 + 64, np.uint8)
            packed = numba.carray(pointer(_aligned(memory_A)), (blocks, e * lanes_A, _WIDE * group), products)
            of_router = numba.carray(pointer(router), (e if joint else 0, i), np.float32)
            _pack(numba.carray(pointer(experts_A), (e, r, i), params), of_router, packed, group)
            _add(total, itemsize, n, i, expert_indices, packed, lanes_A, inner.ctypes.data, pairs)
            hold(memory_A)
        hold(inner)

    return compiled(backward, types.void(*[types.int64] * 19, types.float64))


@functools.cache
def forward_kernel(values: torch.dtype, products: torch.dtype, params: torch.dtype, r: int) -> Any:
    """Router, experts and their update as one function; None for formats or a processor there is none for.

    Args:
        values: of what the router sees; the router is in float32.
        products: of the experts' input and of the output.
        params: of A and B: float32 or as `products`.
        r: rank.

    Returns:
        A function of addresses and sizes, without a check, all tensors contiguous: `(x, inputs, router, A, B, output,
        logits, weights, expert_indices, gated, num_tokens, in, out, num_experts, top_k, scaling)`. It fills `logits`
        (float32 `(E, N)`), `weights` (gates times scaling, float32 `(top_k, N)`), `expert_indices` (int64 `(top_k,
        N)`) and `gated` (in the format of products, `(N, top_k, r)`, r made even in bfloat16), and adds the update to
        `output`. `in` and `out` are multiples of `BLOCK`.
    """
    formats = FORMATS.get(values), FORMATS.get(products), FORMATS.get(params)
    if None in formats or params not in (torch.float32, products) or not has_vectors(formats[1]):
        return None
    return _specialize_forward(*formats, r)


@functools.cache
def backward_kernel(products: torch.dtype, params: torch.dtype, r: int, joint: bool) -> Any:
    """The gradient of `forward_kernel`, for formats that has a function for.

    Args:
        products: see `forward_kernel`.
        params: see `forward_kernel`.
        r: rank.
        joint: whether the router's part is made here too: it reads the same input, and no loss asks for more.

    Returns:
        A function of addresses and sizes, without a check: `(dy, inputs, gated, weights, expert_indices, asked, A, B,
        router, total, grad_A, grad_B, grad_router, grad_logits, num_tokens, in, out, num_experts, top_k, scaling)`.
        It fills `grad_A`, `grad_B` and, if `joint`, `grad_router` (float32), adds the input's gradient to `total`,
        and leaves out what has the address 0. Unless `joint`, it fills `grad_logits` (in the format of products,
        `(E, N)`), with `asked`, what losses of the router ask for (float32 `(E, N)`; 0 if none do).
    """
    return _specialize_backward(FORMATS[products], FORMATS[params], r, joint)

"""A mixture of many tokens and its gradient as two native functions, which read chosen experts only.

Assignments of tokens to experts are sorted by expert. What A gives, and what comes back through B, are products of an
expert's tokens with its rows, where they lie: nothing is gathered. What is added to a token comes from all its experts
at once. So arithmetic does not grow with the number of experts, and the base output is read and written once.

Sums are in float32. Where products are in bfloat16, A, B and what lies between are rounded to it, as they are in
operators of torch; rows then come in pairs, which share a lane of four bytes (`mola.tuner.kernels.cpu.jit_vectors`).
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from mola.tuner.kernels.cpu.jit import FORMATS, MATH, compiled, narrow, pointer, widen
from mola.tuner.kernels.cpu.jit_gates import choose_all, router_logits
from mola.tuner.kernels.cpu.jit_instructions import has_vectors
from mola.tuner.kernels.cpu.jit_products import (
    WIDE,
    add_to_tokens,
    aligned,
    multiply,
    pack,
    round_to,
    rows_by_place,
    sort_by_expert,
    split,
    sum_outer,
)
from mola.tuner.kernels.cpu.jit_vectors import hold


@numba.njit(fastmath=MATH, forceinline=True)
def _apply_weights(sums, weights, places, gated):
    top_k, r = len(weights), sums.shape[1]
    for slot in range(len(places)):
        row, target, weight = sums[places[slot]], gated[slot], weights[slot % top_k, slot // top_k]
        for j in range(r):
            target[j] = narrow(row[j] * weight, target[j])
        for j in range(r, len(target)):
            target[j] = 0


@numba.njit(fastmath=MATH, forceinline=True)
def _gates_backward(sums, gated, weights, expert_indices, places, grad_logits, inner, inner_logits, scaling):
    """Gradients of what A gives and of the router logits: see `mola.tuner.routing.top_k_softmax_backward`."""
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
            # With one choice the gate is 1: rounding would leave something, which optimisers make large.
            value = agreement[k] - weights[k, n] * per_gate * mean if top_k > 1 else np.float32(0)
            if len(inner_logits) > 0:
                expert = expert_indices[k, n]
                from_losses = grad_logits[expert, n] if len(grad_logits) > 0 else np.float32(0)
                inner_logits[expert, n] = narrow(value + from_losses, inner_logits[expert, n])
            else:
                slot = n * top_k + k
                inner[slot, r] = narrow(value, inner[slot, r])


@numba.njit(forceinline=True)
def _start_logits(from_losses, inner_logits):
    """Begin with the gradients that router losses give, or with zeros."""
    for expert in range(len(inner_logits)):
        for n in range(inner_logits.shape[1]):
            value = from_losses[expert, n] if len(from_losses) > 0 else np.float32(0)
            inner_logits[expert, n] = narrow(value, inner_logits[expert, n])


@numba.njit(forceinline=True)
def _targets(matrices, extra, num_experts, r, rows, num_bytes):
    """Addresses of the rows of all experts, and of one of `extra` below those of each if `rows` is not `r`."""
    table = np.empty(num_experts * rows, np.int64)
    for expert in range(num_experts):
        for j in range(rows):
            row = matrices + (expert * r + j) * num_bytes if j < r else extra + expert * num_bytes
            table[expert * rows + j] = row
    return table


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
        choose_all(all_logits, all_weights, expert_indices, np.float32(s))
        order = sort_by_expert(expert_indices, e, 1)
        memory = np.empty(e * r * i * itemsize + 64 if rounds else 0, np.uint8)
        matrices = experts_A
        if rounds:
            matrices = aligned(memory)
            size = e * r * i
            round_to(numba.carray(pointer(experts_A), size, params), numba.carray(pointer(matrices), size, products))
        sums = np.empty((n * top_k, r), np.float32)
        table = rows_by_place(order, top_k, inputs, i * itemsize)
        multiply(table, order, matrices, i * itemsize, sums, r, whole, rest, pairs)
        _apply_weights(sums, all_weights, order.places, all_gated)
        hold(memory)
        blocks = (o + WIDE - 1) // WIDE
        memory_B = np.empty(blocks * e * lanes * WIDE * 4 + 64, np.uint8)
        packed = numba.carray(pointer(aligned(memory_B)), (blocks, e * lanes, WIDE * group), products)
        pack(matrices_B, of_router[:0], packed, group)
        add_to_tokens(output, itemsize, n, o, expert_indices, packed, lanes, gated, pairs)
        hold(memory_B)

    return compiled(forward, types.void(*[types.int64] * 15, types.float64), values, products, params, r)


def _specialize_backward(products: Any, params: Any, r: int, joint: bool) -> Any:
    pairs, itemsize = (1, 2) if products is np.uint16 else (0, 4)
    group, whole, rest = 1 + pairs, r // 8, r % 8 or 1
    rows_A = r + joint  # with a row for the router where it reads the same input
    lanes_B, lanes_A = (r + pairs) // group, (rows_A + pairs) // group
    (whole_B, rest_B), (whole_A, rest_A) = split(r), split(rows_A)
    rounds = params is not products

    def backward(dy, inputs, gated, weights, indices, from_losses, experts_A, experts_B, router,
                 total, grad_A, grad_B, grad_router, grad_logits, n, i, o, e, top_k, s):  # fmt: skip
        all_weights = numba.carray(pointer(weights), (top_k, n), np.float32)
        expert_indices = numba.carray(pointer(indices), (top_k, n), np.int64)
        all_gated = numba.carray(pointer(gated), (n * top_k, lanes_B * group), products)
        of_losses = numba.carray(pointer(from_losses), (e if from_losses else 0, n), np.float32)
        order = sort_by_expert(expert_indices, e, group)
        memory = np.empty(e * r * o * itemsize + 64 if rounds else 0, np.uint8)
        matrices = experts_B
        if rounds:
            matrices = aligned(memory)
            size = e * r * o
            round_to(numba.carray(pointer(experts_B), size, params), numba.carray(pointer(matrices), size, products))
        sums = np.empty((order.starts[e], r), np.float32)
        table = rows_by_place(order, top_k, dy, o * itemsize)
        multiply(table, order, matrices, o * itemsize, sums, r, whole, rest, pairs)
        hold(memory)
        inner = np.empty((n * top_k, lanes_A * group), products)
        inner_logits = numba.carray(pointer(grad_logits), (0 if joint else e, n), products)
        _start_logits(of_losses, inner_logits)
        _gates_backward(
            sums, all_gated, all_weights, expert_indices, order.places, of_losses, inner, inner_logits, np.float32(s)
        )
        if grad_B:
            targets = _targets(grad_B, 0, e, r, r, 4 * o)
            sum_outer(all_gated, table, order, o, itemsize, targets, r, whole_B, rest_B, group, pairs)
        if grad_A:
            targets = _targets(grad_A, grad_router, e, r, rows_A, 4 * i)
            table = rows_by_place(order, top_k, inputs, i * itemsize)
            sum_outer(inner, table, order, i, itemsize, targets, rows_A, whole_A, rest_A, group, pairs)
        if total:
            blocks = (i + WIDE - 1) // WIDE
            memory_A = np.empty(blocks * e * lanes_A * WIDE * 4 + 64, np.uint8)
            packed = numba.carray(pointer(aligned(memory_A)), (blocks, e * lanes_A, WIDE * group), products)
            of_router = numba.carray(pointer(router), (e if joint else 0, i), np.float32)
            pack(numba.carray(pointer(experts_A), (e, r, i), params), of_router, packed, group)
            add_to_tokens(total, itemsize, n, i, expert_indices, packed, lanes_A, inner.ctypes.data, pairs)
            hold(memory_A)
        hold(inner)

    return compiled(backward, types.void(*[types.int64] * 19, types.float64), products, params, r, joint)


@functools.cache
def has_kernels(values: torch.dtype, products: torch.dtype, params: torch.dtype) -> bool:
    """Whether there are functions for these dtypes on this processor; asked without compiling them."""
    known = None not in (FORMATS.get(values), FORMATS.get(products), FORMATS.get(params))
    return known and params in (torch.float32, products) and has_vectors(in_pairs=products is torch.bfloat16)


@functools.cache
def forward_kernel(values: torch.dtype, products: torch.dtype, params: torch.dtype, r: int) -> Any:
    """Router, experts and their update as one function, where `has_kernels`.

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
    return _specialize_forward(FORMATS[values], FORMATS[products], FORMATS[params], r)


@functools.cache
def backward_kernel(products: torch.dtype, params: torch.dtype, r: int, joint: bool) -> Any:
    """The gradient of `forward_kernel`, for formats for which there is one.

    Args:
        products: see `forward_kernel`.
        params: see `forward_kernel`.
        r: rank.
        joint: whether the router's part is made here too: it reads the same input, and no loss asks for more.

    Returns:
        A function of addresses and sizes, without a check: `(dy, inputs, gated, weights, expert_indices, from_losses,
        A, B, router, total, grad_A, grad_B, grad_router, grad_logits, num_tokens, in, out, num_experts, top_k,
        scaling)`. It fills `grad_A`, `grad_B` and, if `joint`, `grad_router` (float32), adds the input's gradient to
        `total`, and leaves out what has the address 0. Unless `joint`, it fills `grad_logits` (in the dtype of
        products, `(E, N)`), with `from_losses`, what router losses add (float32 `(E, N)`; 0 if none do).
    """
    return _specialize_backward(FORMATS[products], FORMATS[params], r, joint)

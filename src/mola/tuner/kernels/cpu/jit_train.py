"""A mixture of many tokens and its gradient as two native functions, which read the chosen experts only.

Assignments of tokens to experts are sorted by expert. The outputs of A, and in the backward pass the products with B,
multiply the tokens of an expert with its rows in place: nothing is gathered. All updates of a token are added at once.
So the arithmetic does not grow with the number of experts, and the base output is read and written once.

Sums are in float32. If products are in bfloat16, A, B and the numbers between them are rounded to bfloat16, as in
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
from mola.tuner.kernels.cpu.jit_gates import choose_for_all_tokens, router_logits
from mola.tuner.kernels.cpu.jit_instructions import has_vectors
from mola.tuner.kernels.cpu.jit_products import (
    WIDE,
    add_to_tokens,
    aligned,
    multiply,
    pack_rows,
    round_to,
    sort_by_expert,
    sorted_row_addresses,
    sum_outer,
    tiles_of_eight,
)
from mola.tuner.kernels.cpu.jit_vectors import hold


@numba.njit(fastmath=MATH, forceinline=True)
def _apply_weights(sums, weights, inverse, gated):
    """Fill `gated: (assignments, r padded)` with the sums `(places, r)` times their weights `(top_k, N)`."""
    top_k, r = len(weights), sums.shape[1]
    for assignment in range(len(inverse)):
        row, target = sums[inverse[assignment]], gated[assignment]
        weight = weights[assignment % top_k, assignment // top_k]
        for j in range(r):
            target[j] = narrow(row[j] * weight, target[j])
        for j in range(r, len(target)):
            target[j] = 0


@numba.njit(fastmath=MATH, forceinline=True)
def _gates_backward(sums, gated, weights, expert_indices, inverse, grad_logits, inner, inner_logits, scaling):
    """Fill the gradients of the output of A and of the router logits.

    For the formula see `mola.tuner.routing.top_k_softmax_backward`. The inputs are `sums: (places, r)`, the gradient of
    the gated output of A in float32; `gated: (assignments, r padded)`, that output; `weights: (top_k, N)`, gates times
    scaling; `expert_indices: (top_k, N)`; `inverse`, the sorted place of every assignment; and `grad_logits: (E, N)`,
    the gradient of the logits from the router losses, `(0, N)` without such losses.

    The results are `inner: (assignments, r padded)`, the gradient of the output of A, and `inner_logits: (E, N)`, that
    of the logits. If `inner_logits` is empty, the gradient of the logits is column `r` of `inner`.
    """
    top_k, num_tokens = weights.shape
    r = sums.shape[1]
    agreement = np.empty(top_k, np.float32)
    per_gate = np.float32(1.0) / scaling
    for n in range(num_tokens):
        mean = np.float32(0)
        for k in range(top_k):
            assignment = n * top_k + k
            grad, forward, target = sums[inverse[assignment]], gated[assignment], inner[assignment]
            weight = weights[k, n]
            total = np.float32(0)
            for j in range(r):
                total += grad[j] * widen(forward[j])
                target[j] = narrow(grad[j] * weight, target[j])
            for j in range(r, len(target)):
                target[j] = 0
            agreement[k] = total
            mean += total
        for k in range(top_k):
            # With one choice the gate is always 1: what is left is rounding, which optimisers would scale up.
            value = agreement[k] - weights[k, n] * per_gate * mean if top_k > 1 else np.float32(0)
            if len(inner_logits) > 0:
                expert = expert_indices[k, n]
                from_losses = grad_logits[expert, n] if len(grad_logits) > 0 else np.float32(0)
                inner_logits[expert, n] = narrow(value + from_losses, inner_logits[expert, n])
            else:
                assignment = n * top_k + k
                inner[assignment, r] = narrow(value, inner[assignment, r])


@numba.njit(forceinline=True)
def _start_logits(from_losses, inner_logits):
    """Fill the gradient of the logits with the part from router losses, or with zeros."""
    for expert in range(len(inner_logits)):
        for n in range(inner_logits.shape[1]):
            value = from_losses[expert, n] if len(from_losses) > 0 else np.float32(0)
            inner_logits[expert, n] = narrow(value, inner_logits[expert, n])


@numba.njit(forceinline=True)
def _row_addresses(matrices, extra, num_experts, r, rows, num_bytes):
    """Addresses of all experts' rows, `(E * rows,)`; if `rows` is `r + 1`, each expert's last row is in `extra`."""
    table = np.empty(num_experts * rows, np.int64)
    for expert in range(num_experts):
        for j in range(rows):
            row = matrices + (expert * r + j) * num_bytes if j < r else extra + expert * num_bytes
            table[expert * rows + j] = row
    return table


def _specialize_forward(values: Any, products: Any, params: Any, r: int) -> Any:
    """Compile the function that `forward_kernel` returns."""
    is_bf16, itemsize = (1, 2) if products is np.uint16 else (0, 4)
    pack, full_tiles, tail = 1 + is_bf16, r // 8, r % 8 or 1
    lanes = (r + is_bf16) // pack
    rounds = params is not products

    # Arguments: see `forward_kernel`. n: tokens, i: in, o: out, e: experts, s: scaling.
    def forward(x, inputs, router, experts_A, experts_B, output, logits, weights, indices, gated, n, i, o, e, top_k, s):
        all_logits = numba.carray(pointer(logits), (e, n), np.float32)
        all_weights = numba.carray(pointer(weights), (top_k, n), np.float32)
        expert_indices = numba.carray(pointer(indices), (top_k, n), np.int64)
        all_gated = numba.carray(pointer(gated), (n * top_k, lanes * pack), products)
        matrices_B = numba.carray(pointer(experts_B), (e, r, o), params)
        router_rows = numba.carray(pointer(router), (e, i), np.float32)
        router_logits(numba.carray(pointer(x), (n, i), values), router_rows, all_logits)
        choose_for_all_tokens(all_logits, all_weights, expert_indices, np.float32(s))
        sort = sort_by_expert(expert_indices, e, 1)
        memory = np.empty(e * r * i * itemsize + 64 if rounds else 0, np.uint8)
        matrices = experts_A
        if rounds:
            matrices = aligned(memory)
            size = e * r * i
            round_to(numba.carray(pointer(experts_A), size, params), numba.carray(pointer(matrices), size, products))
        sums = np.empty((n * top_k, r), np.float32)
        table = sorted_row_addresses(sort, top_k, inputs, i * itemsize)
        multiply(table, sort, matrices, i * itemsize, sums, r, full_tiles, tail, is_bf16)
        _apply_weights(sums, all_weights, sort.inverse, all_gated)
        hold(memory)
        blocks = (o + WIDE - 1) // WIDE
        memory_B = np.empty(blocks * e * lanes * WIDE * 4 + 64, np.uint8)
        packed = numba.carray(pointer(aligned(memory_B)), (blocks, e * lanes, WIDE * pack), products)
        pack_rows(matrices_B, router_rows[:0], packed, pack)
        add_to_tokens(output, itemsize, n, o, expert_indices, packed, lanes, gated, is_bf16)
        hold(memory_B)

    return compiled(forward, types.void(*[types.int64] * 15, types.float64), values, products, params, r)


def _specialize_backward(products: Any, params: Any, r: int, joint: bool) -> Any:
    """Compile the function that `backward_kernel` returns."""
    is_bf16, itemsize = (1, 2) if products is np.uint16 else (0, 4)
    pack, full_tiles, tail = 1 + is_bf16, r // 8, r % 8 or 1
    rows_A = r + joint  # with a row for the router where it reads the same input
    lanes_B, lanes_A = (r + is_bf16) // pack, (rows_A + is_bf16) // pack
    (tiles_B, tail_B), (tiles_A, tail_A) = tiles_of_eight(r), tiles_of_eight(rows_A)
    rounds = params is not products

    # Arguments: see `backward_kernel`. n: tokens, i: in, o: out, e: experts, s: scaling.
    def backward(dy, inputs, gated, weights, indices, from_losses, experts_A, experts_B, router,
                 total, grad_A, grad_B, grad_router, grad_logits, n, i, o, e, top_k, s):  # fmt: skip
        all_weights = numba.carray(pointer(weights), (top_k, n), np.float32)
        expert_indices = numba.carray(pointer(indices), (top_k, n), np.int64)
        all_gated = numba.carray(pointer(gated), (n * top_k, lanes_B * pack), products)
        grad_of_losses = numba.carray(pointer(from_losses), (e if from_losses else 0, n), np.float32)
        sort = sort_by_expert(expert_indices, e, pack)
        memory = np.empty(e * r * o * itemsize + 64 if rounds else 0, np.uint8)
        matrices = experts_B
        if rounds:
            matrices = aligned(memory)
            size = e * r * o
            round_to(numba.carray(pointer(experts_B), size, params), numba.carray(pointer(matrices), size, products))
        sums = np.empty((sort.starts[e], r), np.float32)
        table = sorted_row_addresses(sort, top_k, dy, o * itemsize)
        multiply(table, sort, matrices, o * itemsize, sums, r, full_tiles, tail, is_bf16)
        hold(memory)
        inner = np.empty((n * top_k, lanes_A * pack), products)
        inner_logits = numba.carray(pointer(grad_logits), (0 if joint else e, n), products)
        _start_logits(grad_of_losses, inner_logits)
        _gates_backward(
            sums, all_gated, all_weights, expert_indices, sort.inverse, grad_of_losses, inner, inner_logits,
            np.float32(s),
        )  # fmt: skip
        if grad_B:
            targets = _row_addresses(grad_B, 0, e, r, r, 4 * o)
            sum_outer(all_gated, table, sort, o, itemsize, targets, r, tiles_B, tail_B, pack, is_bf16)
        if grad_A:
            targets = _row_addresses(grad_A, grad_router, e, r, rows_A, 4 * i)
            table = sorted_row_addresses(sort, top_k, inputs, i * itemsize)
            sum_outer(inner, table, sort, i, itemsize, targets, rows_A, tiles_A, tail_A, pack, is_bf16)
        if total:
            blocks = (i + WIDE - 1) // WIDE
            memory_A = np.empty(blocks * e * lanes_A * WIDE * 4 + 64, np.uint8)
            packed = numba.carray(pointer(aligned(memory_A)), (blocks, e * lanes_A, WIDE * pack), products)
            router_rows = numba.carray(pointer(router), (e if joint else 0, i), np.float32)
            pack_rows(numba.carray(pointer(experts_A), (e, r, i), params), router_rows, packed, pack)
            add_to_tokens(total, itemsize, n, i, expert_indices, packed, lanes_A, inner.ctypes.data, is_bf16)
            hold(memory_A)
        hold(inner)

    return compiled(backward, types.void(*[types.int64] * 19, types.float64), products, params, r, joint)


@functools.cache
def has_kernels(values: torch.dtype, products: torch.dtype, params: torch.dtype) -> bool:
    """Whether there are functions for these dtypes on this processor; nothing is compiled to find out."""
    known = None not in (FORMATS.get(values), FORMATS.get(products), FORMATS.get(params))
    return known and params in (torch.float32, products) and has_vectors(is_bf16=products is torch.bfloat16)


@functools.cache
def forward_kernel(values: torch.dtype, products: torch.dtype, params: torch.dtype, r: int) -> Any:
    """Router, experts and their update as one native function; call it only if `has_kernels` is true.

    Args:
        values: dtype of the router's input; the router is in float32.
        products: dtype of the experts' input and of the output.
        params: dtype of A and B: float32, or the dtype of `products`.
        r: rank.

    Returns:
        A function of addresses and sizes. It checks nothing; all tensors are contiguous, `in` and `out` are multiples
        of `BLOCK`. Its arguments in order:

        - `x: (N, in)`, the router's input, and `inputs: (N, in)`, the experts' input.
        - `router: (E, in)`, `experts_A: (E, r, in)`, `experts_B: (E, r, out)`.
        - `output: (N, out)`, to which the update is added.
        - Written: `logits`, float32 `(E, N)`; `weights`, gates times scaling, float32 `(top_k, N)`;
          `expert_indices`, int64 `(top_k, N)`; `gated`, the gated output of A in the dtype of products,
          `(N, top_k, r)`, in bfloat16 with `r` rounded up to an even number.
        - `num_tokens, in, out, num_experts, top_k, scaling`.
    """
    return _specialize_forward(FORMATS[values], FORMATS[products], FORMATS[params], r)


@functools.cache
def backward_kernel(products: torch.dtype, params: torch.dtype, r: int, joint: bool) -> Any:
    """The gradient of `forward_kernel` as one native function.

    Args:
        products: dtype of the experts' input and of the output's gradient.
        params: dtype of A and B: float32, or the dtype of `products`.
        r: rank.
        joint: whether the function also computes the router's gradients. It can if the router reads the same input as
            the experts and there are no router losses.

    Returns:
        A function of addresses and sizes, with the shapes of `forward_kernel`. Its arguments in order:

        - `dy: (N, out)`, the gradient of the output, and `inputs, gated, weights, expert_indices`.
        - `from_losses`, the gradient of the logits from router losses, float32 `(E, N)`; 0 without such losses.
        - `experts_A, experts_B, router`.
        - `total: (N, in)`, to which the input's gradient is added; 0 if it is not wanted.
        - Written, float32: `grad_A`, `grad_B` and, if `joint`, `grad_router`; 0 for `grad_A` or `grad_B` if it is not
          wanted. Unless `joint` also `grad_logits: (E, N)`, in the dtype of products.
        - `num_tokens, in, out, num_experts, top_k, scaling`.
    """
    return _specialize_backward(FORMATS[products], FORMATS[params], r, joint)

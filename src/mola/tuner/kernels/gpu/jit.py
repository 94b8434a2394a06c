"""Triton kernels of a mixture: packing A and router, gates and their gradient, dropout from a seed.

Tensors of rank size have tokens last, see `mola.tuner.kernels.dense`; all are contiguous. Sums are in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

PARTS = 3  # numbers of 16 bits whose sum has the bits of a float32


@triton.jit
def _split(value, dtype: tl.constexpr, STEP: tl.constexpr):
    """Split a float32 number into three of 16 bits, `p0 + p1 / STEP + p2 / STEP^2`: each holds the rounding error of
    those before."""
    p0 = value.to(dtype)
    rest = (value - p0.to(tl.float32)) * STEP
    p1 = rest.to(dtype)
    p2 = ((rest - p1.to(tl.float32)) * STEP).to(dtype)
    return p0, p1, p2


@triton.jit
def pack(
    experts_A, router, packed, in_features, num_rows: tl.constexpr, num_experts: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill `packed: (E*r + 3E, in)` with A `(E*r, in)` and, below it, the router `(E, in)` in three parts.

    The three parts of `_split` keep the router's float32 precision in products of 16 bits. There is one program for
    each pair of a row (of A or of the router) and a block of columns.
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < in_features
    dtype: tl.constexpr = packed.dtype.element_ty
    offset = row.to(tl.int64) * in_features + columns
    if row < num_rows:
        value = tl.load(experts_A + offset, mask=inside)
        tl.store(packed + offset, value.to(dtype), mask=inside)
    else:
        value = tl.load(router + offset - num_rows * in_features, mask=inside).to(tl.float32)
        p0, p1, p2 = _split(value, dtype, STEP)
        tl.store(packed + offset, p0, mask=inside)
        tl.store(packed + offset + num_experts * in_features, p1, mask=inside)
        tl.store(packed + offset + 2 * num_experts * in_features, p2, mask=inside)


@triton.jit
def _largest(keys, experts, free, BLOCK_E: tl.constexpr):
    """Per token the expert with the largest key among those that are free: the first of equal ones, NaN before all."""
    is_nan = (keys != keys) & free
    numbers = tl.where(free & (keys == keys), keys, float("-inf"))
    largest = tl.max(numbers, 0)
    any_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    at_largest = free & (keys == keys) & (numbers == largest[None, :])
    candidates = tl.where(any_nan[None, :], is_nan, at_largest)
    return tl.min(tl.where(candidates, experts, BLOCK_E), 0)


@triton.jit(do_not_specialize=["num_tokens"])
def gates_forward(
    products, hidden, logits, weights, indices, gated, num_tokens, scaling,
    E: tl.constexpr, R: tl.constexpr, TOP_K: tl.constexpr, STEP: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Choose experts, and multiply the output of A by gates and scaling.

    Reads `products: (3E, N)`, the products of the router's three parts with the input in float32, and `hidden: (E*R,
    N)`, the output of A. Writes `logits: (E, N)` and `weights: (E, N)`, gates times scaling, in float32, `indices:
    (TOP_K, N)` in int64, and `gated: (E*R, N)`.

    R is the rank. STEP is explained in `_split`. BLOCK_E and BLOCK_R are E and R, rounded up to a power of 2. A program
    computes BLOCK_N tokens.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < num_tokens
    experts = tl.arange(0, BLOCK_E)[:, None]
    count = num_tokens.to(tl.int64)
    places = experts * count + tokens[None, :]
    valid = (experts < E) & inside[None, :]
    shift = count * E
    z = tl.load(products + 2 * shift + places, mask=valid, other=0.0) / STEP
    z = (z + tl.load(products + shift + places, mask=valid, other=0.0)) / STEP
    z += tl.load(products + places, mask=valid, other=0.0)
    tl.store(logits + places, z, mask=valid)

    free = experts < E
    free = free & (tokens[None, :] >= 0)
    if TOP_K == E:
        # All experts are chosen, in the order of their indices.
        largest = tl.max(tl.where(free, z, float("-inf")), 0)
        powers = tl.where(free, tl.exp(z - largest[None, :]), 0.0)
        gates = powers / tl.sum(powers, 0)[None, :]
        tl.store(indices + places, (experts + tokens[None, :] * 0).to(tl.int64), mask=valid)
    else:
        gates = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        largest = tl.zeros((BLOCK_N,), tl.float32)
        for k in tl.static_range(TOP_K):
            chosen = _largest(z, experts, free, BLOCK_E)
            is_chosen = experts == chosen[None, :]
            value = tl.sum(tl.where(is_chosen, z, 0.0), 0)
            if k == 0:
                largest = value
            power = tl.exp(value - largest)
            total += power
            gates += tl.where(is_chosen, power[None, :], 0.0)
            free = free & (experts != chosen[None, :])
            tl.store(indices + k * count + tokens, chosen.to(tl.int64), mask=inside)
        gates = gates / total[None, :]
        # Experts that were not chosen have a gate of 0, also if the sum is NaN.
        gates = tl.where(free, 0.0, gates)
    w = gates * scaling
    tl.store(weights + places, w, mask=valid)

    ranks = tl.arange(0, BLOCK_R)[:, None]
    some = (ranks < R) & inside[None, :]
    for e in range(E):
        weight = tl.sum(tl.where(experts == e, w, 0.0), 0)
        at = (e * R + ranks) * count + tokens[None, :]
        row = tl.load(hidden + at, mask=some, other=0.0).to(tl.float32)
        tl.store(gated + at, (row * weight[None, :]).to(gated.dtype.element_ty), mask=some)


@triton.jit(do_not_specialize=["num_tokens"])
def gates_backward(
    grad_gated, gated, weights, grad_logits, both, num_tokens, scaling,
    E: tl.constexpr, R: tl.constexpr, HAS_GRAD_LOGITS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the output of A and of the logits: see `mola.tuner.kernels.gates.gates_backward`.

    Reads `grad_gated: (E*R, N)`, `gated: (E*R, N)`, `weights: (E, N)`, gates times scaling in float32, and, if
    HAS_GRAD_LOGITS, `grad_logits: (E, N)`, the gradient from router losses in float32. Writes `both: (E*R + E, N)`. The
    other constants are those of `gates_forward`.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < num_tokens
    experts = tl.arange(0, BLOCK_E)[:, None]
    ranks = tl.arange(0, BLOCK_R)[:, None]
    some = (ranks < R) & inside[None, :]
    dtype: tl.constexpr = both.dtype.element_ty
    agreement = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    for e in range(E):
        at = (e * R + ranks) * num_tokens.to(tl.int64) + tokens[None, :]
        through = tl.load(grad_gated + at, mask=some, other=0.0).to(tl.float32)
        forward = tl.load(gated + at, mask=some, other=0.0).to(tl.float32)
        weight = tl.load(weights + e * num_tokens.to(tl.int64) + tokens, mask=inside, other=0.0)
        tl.store(both + at, (through * weight[None, :]).to(dtype), mask=some)
        agreement = tl.where(experts == e, tl.sum(through * forward, 0)[None, :], agreement)
    places = experts * num_tokens.to(tl.int64) + tokens[None, :]
    valid = (experts < E) & inside[None, :]
    w = tl.load(weights + places, mask=valid, other=0.0)
    dz = agreement - w * (tl.sum(agreement, 0) / scaling)[None, :]
    if HAS_GRAD_LOGITS:
        dz += tl.load(grad_logits + places, mask=valid, other=0.0)
    tl.store(both + E * R * num_tokens.to(tl.int64) + places, dz.to(dtype), mask=valid)


@triton.jit(do_not_specialize=["num_elements"])
def drop(
    source, seed, target, num_elements,
    SEEDS: tl.constexpr, STEPS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy `source`, with zeros for dropped elements, to `target`; if ADD, add it to what the target holds.

    `seed` is the address of an int64: a probability, as a number of STEPS, times SEEDS (a power of 2), plus a random
    seed. An element is dropped if its number, drawn by Philox from the seed, is below the probability. One call of
    Philox draws four numbers, one for each quarter of a program's elements; BLOCK is the size of a quarter. Source and
    target have `num_elements` elements, less than 2^32.
    """
    start = tl.program_id(0).to(tl.int64) * (4 * BLOCK)
    lanes = tl.arange(0, BLOCK)
    both = tl.load(seed)
    probability = (both // SEEDS).to(tl.float32) / STEPS
    draws = tl.rand4x(both % SEEDS, tl.program_id(0) * BLOCK + lanes)
    for quarter in tl.static_range(4):
        at = start + quarter * BLOCK + lanes
        inside = at < num_elements
        value = tl.load(source + at, mask=inside, other=0.0)
        value = tl.where(draws[quarter] >= probability, value, 0.0)
        if ADD:
            value = tl.load(target + at, mask=inside, other=0.0).to(tl.float32) + value.to(tl.float32)
        tl.store(target + at, value.to(target.dtype.element_ty), mask=inside)

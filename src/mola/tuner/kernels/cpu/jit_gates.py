"""Gates of many tokens, and their gradient, as two native functions, which numba compiles: the extra `cpu`.

As operators of torch, gates are some fifteen calls forward and eight backward for every linear, on few numbers, and the
router's product is too thin for the libraries: with a bfloat16 input, which it reads here as it is, it takes a third of
the time. Tensors of rank size have tokens last, as in `mola.tuner.kernels.dense`.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from mola.tuner.kernels.cpu.jit import FORMATS, MATH, choose, compiled, narrow, pointer, widen

_ROWS, _COLUMNS = 8, 768  # of one tile of the input, which stays in the first cache


@numba.njit(fastmath=MATH, inline="always")
def _tile(x, a, b):
    """Products of eight rows with two, sixteen sums at once: as many as there are registers for."""
    s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    s4, s5, s6, s7 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    t0, t1, t2, t3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    t4, t5, t6, t7 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    for i in range(len(a)):
        u, v = a[i], b[i]
        s0 += x0[i] * u
        t0 += x0[i] * v
        s1 += x1[i] * u
        t1 += x1[i] * v
        s2 += x2[i] * u
        t2 += x2[i] * v
        s3 += x3[i] * u
        t3 += x3[i] * v
        s4 += x4[i] * u
        t4 += x4[i] * v
        s5 += x5[i] * u
        t5 += x5[i] * v
        s6 += x6[i] * u
        t6 += x6[i] * v
        s7 += x7[i] * u
        t7 += x7[i] * v
    return (s0, s1, s2, s3, s4, s5, s6, s7), (t0, t1, t2, t3, t4, t5, t6, t7)


@numba.njit(fastmath=MATH, forceinline=True)
def router_logits(x, router, logits):
    """Fill `logits: (E, N)` with the products of `x: (N, in)` and the float32 `router: (E, in)`, in float32."""
    num_tokens, in_features = x.shape
    last = len(router) - 1
    rows = np.empty((_ROWS, _COLUMNS), np.float32)
    logits[:] = 0
    for first in range(0, num_tokens, _ROWS):
        count = min(_ROWS, num_tokens - first)
        for start in range(0, in_features, _COLUMNS):
            width = min(_COLUMNS, in_features - start)
            for n in range(_ROWS):  # where tokens or experts run out, the last one again: all are added up alike
                source, row = x[min(first + n, num_tokens - 1), start : start + width], rows[n]
                for i in range(width):
                    row[i] = widen(source[i])
            for expert in range(0, last + 1, 2):
                other = min(expert + 1, last)
                s, t = _tile(rows, router[expert, start : start + width], router[other, start : start + width])
                for n in range(count):
                    logits[expert, first + n] += s[n]
                    if other != expert:
                        logits[other, first + n] += t[n]


@numba.njit(fastmath=MATH, forceinline=True)
def choose_all(logits, gates, expert_indices, scaling):
    """Of every token the experts with the largest logits, and their gates times scaling, both `(top_k, N)`."""
    num_experts, num_tokens = logits.shape
    top_k = len(expert_indices)
    of_token = np.empty(num_experts, np.float32)
    chosen = np.empty(top_k, np.int64)
    gates_of_token = np.empty(top_k, np.float32)
    for n in range(num_tokens):
        for expert in range(num_experts):
            of_token[expert] = logits[expert, n]
        choose(of_token, chosen, gates_of_token, scaling)
        for k in range(top_k):
            expert_indices[k, n] = chosen[k]
            gates[k, n] = gates_of_token[k]


@numba.njit(forceinline=True)
def _scatter(gates, expert_indices, weights):
    top_k, num_tokens = gates.shape
    weights[:] = 0
    for k in range(top_k):
        for n in range(num_tokens):
            weights[expert_indices[k, n], n] = gates[k, n]


@numba.njit(fastmath=MATH, forceinline=True)
def _multiply(hidden, weights):
    num_experts, r, num_tokens = hidden.shape
    for expert in range(num_experts):
        gates = weights[expert]
        for j in range(r):
            row = hidden[expert, j]
            for n in range(num_tokens):
                row[n] = narrow(widen(row[n]) * gates[n], row[n])


@numba.njit(fastmath=MATH, forceinline=True)
def _through_gates(hidden, gated, weights, grad_logits, inner_hidden, inner_logits, scaling):
    num_experts, r, num_tokens = hidden.shape
    agreement = np.zeros((num_experts, num_tokens), np.float32)
    mean = np.zeros(num_tokens, np.float32)
    for expert in range(num_experts):
        sums, gates = agreement[expert], weights[expert]
        for j in range(r):
            through, forward, target = hidden[expert, j], gated[expert, j], inner_hidden[expert, j]
            for n in range(num_tokens):
                value = widen(through[n])
                sums[n] += value * widen(forward[n])
                target[n] = narrow(value * gates[n], through[n])
        for n in range(num_tokens):
            mean[n] += sums[n]
    per_gate = np.float32(1.0) / scaling
    for expert in range(num_experts):
        sums, gates, target = agreement[expert], weights[expert], inner_logits[expert]
        for n in range(num_tokens):
            sums[n] -= gates[n] * per_gate * mean[n]
        if len(grad_logits) > 0:
            from_losses = grad_logits[expert]
            for n in range(num_tokens):
                sums[n] += from_losses[n]
        for n in range(num_tokens):
            target[n] = narrow(sums[n], target[n])


def _specialize_gates(values: Any, products: Any) -> Any:
    def gates(x, router, hidden, logits, weights, expert_indices, num_tokens, in_features, num_experts, r, top_k, s):
        all_logits = numba.carray(pointer(logits), (num_experts, num_tokens), np.float32)
        all_weights = numba.carray(pointer(weights), (num_experts, num_tokens), np.float32)
        indices = numba.carray(pointer(expert_indices), (top_k, num_tokens), np.int64)
        rows = numba.carray(pointer(x), (num_tokens, in_features), values)
        router_logits(rows, numba.carray(pointer(router), (num_experts, in_features), np.float32), all_logits)
        of_chosen = np.empty((top_k, num_tokens), np.float32)
        choose_all(all_logits, of_chosen, indices, np.float32(s))
        _scatter(of_chosen, indices, all_weights)
        _multiply(numba.carray(pointer(hidden), (num_experts, r, num_tokens), products), all_weights)

    return compiled(gates, types.void(*[types.int64] * 11, types.float64), values, products)


def _specialize_gradient(products: Any) -> Any:
    def through(hidden, gated, weights, grad_logits, inner, num_tokens, num_experts, r, s):
        size = num_experts * r
        both = numba.carray(pointer(inner), (size + num_experts, num_tokens), products)
        _through_gates(
            numba.carray(pointer(hidden), (num_experts, r, num_tokens), products),
            numba.carray(pointer(gated), (num_experts, r, num_tokens), products),
            numba.carray(pointer(weights), (num_experts, num_tokens), np.float32),
            numba.carray(pointer(grad_logits), (num_experts if grad_logits else 0, num_tokens), np.float32),
            both[:size].reshape((num_experts, r, num_tokens)),
            both[size:],
            np.float32(s),
        )

    return compiled(through, types.void(*[types.int64] * 8, types.float64), products)


@functools.cache
def gates_kernel(values: torch.dtype, products: torch.dtype) -> Any:
    """Router, choice and gates as one function; None for formats there is none for.

    Args:
        values: of the input; the router is in float32.
        products: of what A gives.

    Returns:
        A function of addresses and sizes, without a check, all tensors contiguous: `(x, router, hidden, logits,
        weights, expert_indices, num_tokens, in, num_experts, r, top_k, scaling)`. It fills `logits`, `weights` (gates
        times scaling, float32 `(E, N)`) and `expert_indices` (int64 `(top_k, N)`), and multiplies `hidden: (E*r, N)`
        by the weights.
    """
    formats = FORMATS.get(values), FORMATS.get(products)
    return None if None in formats else _specialize_gates(*formats)


@functools.cache
def gradient_kernel(products: torch.dtype) -> Any:
    """The gradient of gates; None for a format there is none for.

    Returns:
        A function of addresses and sizes, without a check: `(hidden, gated, weights, grad_logits, inner, num_tokens,
        num_experts, r, scaling)`. From `hidden: (E*r, N)`, the gradient of what follows the gates, it fills `inner:
        (E*r + E, N)` with the gradients of what A gives and of the router logits. The address of `grad_logits` is 0
        where there are none.
    """
    return _specialize_gradient(FORMATS[products]) if products in FORMATS else None

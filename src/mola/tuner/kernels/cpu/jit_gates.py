"""Gates of many tokens, and their gradient, as two native functions.

In operators of torch, gates are some fifteen calls forward and eight backward for every linear, on few numbers. And
the router's product is too thin for the libraries: the function here reads a bfloat16 input without a copy and takes a
third of the time. Tensors of rank size have tokens last, as in `mola.tuner.kernels.dense`.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from mola.tuner.kernels.cpu.jit import FORMATS, MATH, choose_experts, compiled, narrow, pointer, widen

_ROWS, _COLUMNS = 8, 768  # of a tile of the input, so that it stays in the first cache


@numba.njit(fastmath=MATH, inline="always")
def _tile(x, a, b):
    """Products of eight rows with `a` and with `b`: sixteen sums, which all stay in registers."""
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
            for n in range(_ROWS):  # beyond the last token the last token again, so that all are added up alike
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
def choose_for_all_tokens(logits, gates, expert_indices, scaling):
    """Fill `expert_indices` with every token's experts of the largest logits, `gates` with their gates times scaling.

    Both are `(top_k, N)`; `logits: (E, N)`.
    """
    num_experts, num_tokens = logits.shape
    top_k = len(expert_indices)
    token_logits = np.empty(num_experts, np.float32)
    chosen = np.empty(top_k, np.int64)
    token_gates = np.empty(top_k, np.float32)
    for n in range(num_tokens):
        for expert in range(num_experts):
            token_logits[expert] = logits[expert, n]
        choose_experts(token_logits, chosen, token_gates, scaling)
        for k in range(top_k):
            expert_indices[k, n] = chosen[k]
            gates[k, n] = token_gates[k]


@numba.njit(forceinline=True)
def _scatter(gates, expert_indices, weights):
    """Fill `weights: (E, N)` with the gates `(top_k, N)` of the chosen experts, and 0 for all others."""
    top_k, num_tokens = gates.shape
    weights[:] = 0
    for k in range(top_k):
        for n in range(num_tokens):
            weights[expert_indices[k, n], n] = gates[k, n]


@numba.njit(fastmath=MATH, forceinline=True)
def _multiply(hidden, weights):
    """Multiply `hidden: (E, r, N)` by `weights: (E, N)`, in place."""
    num_experts, r, num_tokens = hidden.shape
    for expert in range(num_experts):
        gates = weights[expert]
        for j in range(r):
            row = hidden[expert, j]
            for n in range(num_tokens):
                row[n] = narrow(widen(row[n]) * gates[n], row[n])


@numba.njit(fastmath=MATH, forceinline=True)
def _gates_backward(grad_gated, gated, weights, grad_logits, grad_hidden, grad_router_logits, scaling):
    """Fill the gradients `grad_hidden: (E, r, N)` of the output of A and `grad_router_logits: (E, N)`.

    For the formula and the other arguments see `mola.tuner.kernels.gates.gates_backward`; `grad_logits` is `(0, N)`
    without router losses.
    """
    num_experts, r, num_tokens = grad_gated.shape
    agreement = np.zeros((num_experts, num_tokens), np.float32)
    mean = np.zeros(num_tokens, np.float32)
    for expert in range(num_experts):
        sums, gates = agreement[expert], weights[expert]
        for j in range(r):
            grad, forward, target = grad_gated[expert, j], gated[expert, j], grad_hidden[expert, j]
            for n in range(num_tokens):
                value = widen(grad[n])
                sums[n] += value * widen(forward[n])
                target[n] = narrow(value * gates[n], grad[n])
        for n in range(num_tokens):
            mean[n] += sums[n]
    per_gate = np.float32(1.0) / scaling
    for expert in range(num_experts):
        sums, gates, target = agreement[expert], weights[expert], grad_router_logits[expert]
        for n in range(num_tokens):
            sums[n] -= gates[n] * per_gate * mean[n]
        if len(grad_logits) > 0:
            from_losses = grad_logits[expert]
            for n in range(num_tokens):
                sums[n] += from_losses[n]
        for n in range(num_tokens):
            target[n] = narrow(sums[n], target[n])


def _specialize_gates(values: Any, products: Any) -> Any:
    """Compile `gates_kernel` for the dtypes of the router's input, and of the output of A."""

    def gates(x, router, hidden, logits, weights, expert_indices, num_tokens, in_features, num_experts, r, top_k, s):
        all_logits = numba.carray(pointer(logits), (num_experts, num_tokens), np.float32)
        all_weights = numba.carray(pointer(weights), (num_experts, num_tokens), np.float32)
        indices = numba.carray(pointer(expert_indices), (top_k, num_tokens), np.int64)
        rows = numba.carray(pointer(x), (num_tokens, in_features), values)
        router_logits(rows, numba.carray(pointer(router), (num_experts, in_features), np.float32), all_logits)
        chosen_gates = np.empty((top_k, num_tokens), np.float32)
        choose_for_all_tokens(all_logits, chosen_gates, indices, np.float32(s))
        _scatter(chosen_gates, indices, all_weights)
        _multiply(numba.carray(pointer(hidden), (num_experts, r, num_tokens), products), all_weights)

    return compiled(gates, types.void(*[types.int64] * 11, types.float64), values, products)


def _specialize_gradient(products: Any) -> Any:
    """Compile `gradient_kernel` for the dtype of the output of A."""

    def gradient(grad_gated, gated, weights, grad_logits, both, num_tokens, num_experts, r, s):
        size = num_experts * r
        gradients = numba.carray(pointer(both), (size + num_experts, num_tokens), products)
        _gates_backward(
            numba.carray(pointer(grad_gated), (num_experts, r, num_tokens), products),
            numba.carray(pointer(gated), (num_experts, r, num_tokens), products),
            numba.carray(pointer(weights), (num_experts, num_tokens), np.float32),
            numba.carray(pointer(grad_logits), (num_experts if grad_logits else 0, num_tokens), np.float32),
            gradients[:size].reshape((num_experts, r, num_tokens)),
            gradients[size:],
            np.float32(s),
        )

    return compiled(gradient, types.void(*[types.int64] * 8, types.float64), products)


@functools.cache
def gates_kernel(values: torch.dtype, products: torch.dtype) -> Any:
    """Router, choice of experts and gates as one native function; None if there is none for the dtypes.

    Args:
        values: dtype of the router's input; the router is in float32.
        products: dtype of the output of A.

    Returns:
        A function of addresses and sizes: `(x, router, hidden, logits, weights, expert_indices, num_tokens, in,
        num_experts, r, top_k, scaling)`. It reads `x (N, in)` and `router (E, in)`, fills `logits` and `weights` (gates
        times scaling), both float32 `(E, N)`, and `expert_indices`, int64 `(top_k, N)`, and multiplies `hidden (E*r,
        N)`, the output of A, by the weights. It checks nothing; all tensors are contiguous.
    """
    formats = FORMATS.get(values), FORMATS.get(products)
    return None if None in formats else _specialize_gates(*formats)


@functools.cache
def gradient_kernel(products: torch.dtype) -> Any:
    """The gradient of `gates_kernel` as one native function; None if there is none for the dtype.

    Returns:
        A function of addresses and sizes: `(grad_gated, gated, weights, grad_logits, both, num_tokens, num_experts, r,
        scaling)`. It fills `both (E*r + E, N)`, the result of `mola.tuner.kernels.gates.gates_backward`, whose
        arguments the others are; the address of `grad_logits` is 0 without router losses.
    """
    return _specialize_gradient(FORMATS[products]) if products in FORMATS else None

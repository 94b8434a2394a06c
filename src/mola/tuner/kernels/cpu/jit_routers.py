"""Native functions for routers other than `top_k_softmax`: their gates, and the gradient of their logits.

For one token, the gates `g` of these routers have the derivative

    dg / dz = diag(q) - q q^T / sum_e q_e

with a slope `q_e >= 0` of every chosen expert. `top_k_softmax` has it too, with `q = g`.
"""

from __future__ import annotations

import numba
import numpy as np

SOFTMAX, CONSTANT, SPARSE = 0, 1, 2  # numbers of the routers in `mola.tuner.routing.ROUTERS`


@numba.njit(forceinline=True)
def make_constant(weights, slopes, scaling):
    """Turn the gates of `top_k_softmax` times scaling, `weights: (top_k, N)`, into those of `top_k_constant`.

    The slopes are the old gates: `slopes: (top_k, N)` is filled with them, times scaling.
    """
    top_k, num_tokens = weights.shape
    weight = scaling / np.float32(top_k)
    for k in range(top_k):
        for n in range(num_tokens):
            slopes[k, n] = weights[k, n]
            weights[k, n] = weight + np.float32(0) * weights[k, n]  # NaN stays NaN


@numba.njit(forceinline=True)
def make_sparse(logits, expert_indices, weights, slopes, scaling, sparsegen_lambda):
    """Fill `weights: (top_k, N)` with the gates of `sparsegen` times scaling, and `slopes: (top_k, N)` with its slopes.

    `logits: (E, N)`; `expert_indices: (top_k, N)` are the chosen experts, largest logit first. The slopes of experts
    with gate 0 are 0, the others are `scaling / (1 - lambda)`.
    """
    top_k, num_tokens = weights.shape
    width = np.float32(1) - sparsegen_lambda
    for n in range(num_tokens):
        largest, total, tau = logits[expert_indices[0, n], n], np.float32(0), np.float32(-np.inf)
        for k in range(top_k):
            total += logits[expert_indices[k, n], n] - largest
            found = (total - width) / np.float32(k + 1)
            if not found <= tau:  # NaN is kept, too
                tau = found
        for k in range(top_k):
            above = logits[expert_indices[k, n], n] - largest - tau
            is_zero = above <= np.float32(0)
            weights[k, n] = np.float32(0) if is_zero else above / width * scaling
            slopes[k, n] = np.float32(0) if is_zero else scaling / width


@numba.njit(forceinline=True)
def gradient_of_logits(agreement, weights, slopes):
    """Turn a token's `agreement: (top_k,)` into the gradient of the chosen logits, in place.

    `agreement` is `g_e dL/dg_e`, see `mola.tuner.routing.top_k_softmax_backward`; `weights: (top_k,)` are the gates and
    `slopes: (top_k,)` the slopes, both times scaling.
    """
    total, mean = np.float32(0), np.float32(0)
    for k in range(len(agreement)):
        agreement[k] = np.float32(0) if weights[k] == np.float32(0) else agreement[k] * slopes[k] / weights[k]
        mean += agreement[k]
        total += slopes[k]
    for k in range(len(agreement)):
        agreement[k] -= slopes[k] / total * mean

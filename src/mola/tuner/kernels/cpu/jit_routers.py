"""Native functions for routers other than `top_k_softmax`: their gates, and the gradient of their logits.

For one token, the gates `g` of these routers have the derivative

    dg / dz = diag(q) - q q^T / sum_e q_e

with a slope `q_e >= 0` of every chosen expert. `top_k_softmax` has it too, with `q = g`.
"""

from __future__ import annotations

import numba
import numpy as np


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
def gradient_of_logits(agreement, weights, slopes):
    """Turn a token's `agreement: (top_k,)` into the gradient of the chosen logits, in place.

    `agreement` is `g_e dL/dg_e`, see `mola.tuner.routing.top_k_softmax_backward`; `weights: (top_k,)` are the gates and
    `slopes: (top_k,)` the slopes, both times scaling.
    """
    total, mean = np.float32(0), np.float32(0)
    for k in range(len(agreement)):
        agreement[k] = agreement[k] * slopes[k] / weights[k]
        mean += agreement[k]
        total += slopes[k]
    for k in range(len(agreement)):
        agreement[k] -= slopes[k] / total * mean

"""Gates of many tokens and their gradient, natively where there is a function for it, else in operators of torch.

Tensors of rank size have tokens last, see `mola.tuner.kernels.dense`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mola.tuner.kernels import native
from mola.tuner.kernels.api import MixtureSettings
from mola.tuner.routing import (
    DEFAULT_ROUTER,
    route_all,
    router_backward,
    router_logits_by_expert,
    top_k_softmax_backward,
)

_native = native.load("gates")  # without numba as yet


class Gates(NamedTuple):
    """What a router says of `N` tokens.

    Attributes:
        logits: float32 `(E, N)`.
        weights: gates times scaling, zero for experts that were not chosen, float32 `(E, N)`.
        expert_indices: chosen experts in any order, integers `(top_k, N)`.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    expert_indices: torch.Tensor


def apply_gates(tokens: torch.Tensor, router: torch.Tensor, hidden: torch.Tensor, settings: MixtureSettings) -> Gates:
    """Route tokens, and multiply what A gives by gates and scaling, in place.

    Args:
        tokens: what the router sees, `(N, in)`.
        router: `(E, in)`, float32 or wider.
        hidden: `(E*r, N)`, contiguous.
        settings: top_k, scaling and router are read.
    """
    found = None if _native is None else _native.apply_gates(tokens, router, hidden, settings)
    if found is not None:
        return Gates(*found)
    logits = router_logits_by_expert(tokens, router)
    gates, expert_indices = route_all(settings.router, logits, settings.top_k, 0)
    weights = gates.mul_(settings.scaling)
    hidden.view(len(router), len(hidden) // len(router), -1).mul_(weights.to(hidden.dtype).unsqueeze(1))
    return Gates(logits, weights, expert_indices)


def keep_losses_only(
    through: torch.Tensor, grad_logits: torch.Tensor | None, settings: MixtureSettings
) -> torch.Tensor:
    """Of the logits' gradient `(E, N)`, with `top_k` 1, keep what losses of the router ask for, in place.

    The only gate is 1 then. What rounding leaves of `v - w v / scaling` optimisers would make as large as any gradient.
    """
    if settings.top_k > 1:
        return through
    return through.zero_() if grad_logits is None else through.copy_(grad_logits)


def gates_backward(
    grad_gated: torch.Tensor,
    gated: torch.Tensor,
    weights: torch.Tensor,
    logits: torch.Tensor | None,
    grad_logits: torch.Tensor | None,
    settings: MixtureSettings,
) -> torch.Tensor:
    """Gradients of what A gives and, below them, of the router logits: `(E*r + E, N)` in the dtype of `gated`.

    With `t` the gradient of what the gates gave, and `a_e = w_e h_e` that itself: `dh_e = w_e t_e`; for `dz` see
    `mola.tuner.routing.top_k_softmax_backward`, with `v_e = <t_e, a_e>`.

    Args:
        grad_gated: `t`, `(E*r, N)`.
        gated: `a`, `(E*r, N)`.
        weights: `w`, `(E, N)`; 0 for experts that were not chosen, whose gradients are 0 then.
        logits: `(E, N)`, for other routers than the default one.
        grad_logits: what losses of the router ask for, `(E, N)`.
        settings: top_k, scaling and router are read.
    """
    (size, num_tokens), num_experts = gated.shape, len(weights)
    both = gated.new_empty(size + num_experts, num_tokens)
    if _native is not None and _native.gates_backward(grad_gated, gated, weights, grad_logits, both, settings):
        keep_losses_only(both[size:], grad_logits, settings)
        return both
    by_expert = num_experts, size // num_experts, -1
    # Products of float16 may be too large for it.
    first = grad_gated.float() if gated.dtype is torch.float16 else grad_gated
    agreement = (first * gated).view(by_expert).sum(1, dtype=weights.dtype)
    if settings.router == DEFAULT_ROUTER:
        top_k_softmax_backward(agreement, weights, settings.scaling, grad_logits, out=both[size:])
        keep_losses_only(both[size:], grad_logits, settings)
    else:
        assert logits is not None
        through = router_backward(settings.router, logits, settings.top_k, agreement)
        both[size:] = through if grad_logits is None else through + grad_logits
    torch.mul(grad_gated.view(by_expert), weights.to(gated.dtype).unsqueeze(1), out=both[:size].view(by_expert))
    return both

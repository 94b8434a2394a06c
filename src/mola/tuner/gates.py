"""Gates of many tokens and their gradient, natively where there is numba (the extra `cpu`), else in operators of torch.

Tensors of rank size have tokens last, see `mola.tuner.mixture`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mola.tuner.pieces import have_addresses, import_native
from mola.tuner.routing import choose_gates, logits_by_expert

# The native functions use one thread. With more of them torch's router product, which shares its work, catches up.
_MAX_THREADS = 2
_NATIVE = "mola.tuner.native_routing"


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


def apply_gates(tokens: torch.Tensor, router: torch.Tensor, hidden: torch.Tensor, top_k: int, scaling: float) -> Gates:
    """Route tokens, and multiply what A gives by gates and scaling, in place.

    Args:
        tokens: what the router sees, `(N, in)`.
        router: `(E, in)`, float32 or wider.
        hidden: `(E*r, N)`, contiguous.
        top_k: experts per token.
        scaling: what gates are multiplied by.
    """
    kernel = _native_gates(tokens, router, hidden)
    if kernel is None:
        logits = logits_by_expert(tokens, router)
        gates, expert_indices = choose_gates(logits, top_k)
        weights = gates.mul_(scaling)
        hidden.view(len(router), len(hidden) // len(router), -1).mul_(weights.to(hidden.dtype).unsqueeze(1))
        return Gates(logits, weights, expert_indices)
    (num_experts, in_features), num_tokens = router.shape, len(tokens)
    tokens, router = tokens.contiguous(), router.contiguous()
    logits, weights = (torch.empty((num_experts, num_tokens), dtype=torch.float32) for _ in range(2))
    expert_indices = torch.empty((top_k, num_tokens), dtype=torch.int64)
    tensors = tokens, router, hidden, logits, weights, expert_indices
    addresses = [tensor.data_ptr() for tensor in tensors]
    kernel(*addresses, num_tokens, in_features, num_experts, len(hidden) // num_experts, top_k, scaling)
    return Gates(logits, weights, expert_indices)


def through_gates(
    grad_gated: torch.Tensor,
    gated: torch.Tensor,
    weights: torch.Tensor,
    grad_logits: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Gradients of what A gives and, below them, of the router logits: `(E*r + E, N)` in the format of `gated`.

    With `t` the gradient of what the gates gave, `a_e = w_e h_e` that itself, and per expert `v_e = <t_e, a_e>`:

        dh_e = w_e t_e,   dz_e = v_e - g_e sum_e v_e    (the softmax over the chosen, `w = scaling g`)

    Args:
        grad_gated: `t`, `(E*r, N)`.
        gated: `a`, `(E*r, N)`.
        weights: `w`, `(E, N)`; 0 for experts that were not chosen, whose gradients are 0 then.
        grad_logits: what losses of the router ask for, `(E, N)`.
        scaling: what gates were multiplied by.
    """
    (size, num_tokens), num_experts = gated.shape, len(weights)
    inner = gated.new_empty(size + num_experts, num_tokens)
    kernel = _native_gradient(grad_gated, gated, weights)
    if kernel is None:
        _through_gates_in_torch(grad_gated, gated, weights, grad_logits, scaling, inner)
        return inner
    if grad_logits is not None:
        grad_logits = grad_logits.to(torch.float32).contiguous()
    grad_gated, gated, weights = grad_gated.contiguous(), gated.contiguous(), weights.contiguous()
    asked = 0 if grad_logits is None else grad_logits.data_ptr()
    addresses = grad_gated.data_ptr(), gated.data_ptr(), weights.data_ptr(), asked, inner.data_ptr()
    kernel(*addresses, num_tokens, num_experts, size // num_experts, scaling)
    return inner


def _through_gates_in_torch(grad_gated, gated, weights, grad_logits, scaling: float, inner: torch.Tensor) -> None:
    num_experts, size = len(weights), len(gated)
    by_expert = num_experts, size // num_experts, -1
    agreement = (grad_gated * gated).view(by_expert).sum(1, dtype=weights.dtype)
    mean = agreement.sum(0, keepdim=True)
    if grad_logits is not None:
        agreement += grad_logits
    torch.addcmul(agreement, weights, mean, value=-1.0 / scaling, out=inner[size:])
    torch.mul(grad_gated.view(by_expert), weights.to(gated.dtype).unsqueeze(1), out=inner[:size].view(by_expert))


def _native_gates(tokens: torch.Tensor, router: torch.Tensor, hidden: torch.Tensor) -> Any:
    if router.dtype != torch.float32 or not _is_native(tokens, router, hidden):
        return None
    if router.shape[1] != tokens.shape[1] or len(hidden) % len(router):
        return None  # operators of torch say what does not fit
    native = import_native(_NATIVE)
    return None if native is None else native.gates_kernel(tokens.dtype, hidden.dtype)


def _native_gradient(grad_gated: torch.Tensor, gated: torch.Tensor, weights: torch.Tensor) -> Any:
    if weights.dtype != torch.float32 or not _is_native(grad_gated, gated, weights):
        return None
    native = import_native(_NATIVE)
    return None if native is None else native.gradient_kernel(gated.dtype)


def _is_native(*tensors: torch.Tensor) -> bool:
    return have_addresses(*tensors) and torch.get_num_threads() <= _MAX_THREADS

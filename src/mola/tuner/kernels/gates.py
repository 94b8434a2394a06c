"""Gates of many tokens and their gradient, by numba if that is faster, else in operators of torch.

Shapes: `N` tokens, `E` experts of rank `r`. Tensors of rank size have tokens last, see `mola.tuner.kernels.dense`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mola.tuner.kernels import native
from mola.tuner.kernels.api import MixtureSettings
from mola.tuner.kernels.tensors import are_plain_cpu_tensors
from mola.tuner.routing import (
    DEFAULT_ROUTER,
    route_dense,
    router_backward,
    router_logits_by_expert,
    top_k_softmax_backward,
)

_MAX_THREADS = 2  # the native functions use one thread: with more than two, torch's router product is as fast


class Gates(NamedTuple):
    """What a router returns for `N` tokens.

    Attributes:
        logits: float32 `(E, N)`.
        weights: gates times scaling, zero for experts that were not chosen, float32 `(E, N)`.
        expert_indices: chosen experts in any order, integers `(top_k, N)`.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    expert_indices: torch.Tensor


def apply_gates(tokens: torch.Tensor, router: torch.Tensor, hidden: torch.Tensor, settings: MixtureSettings) -> Gates:
    """Route tokens, and multiply the output of A by gates and scaling, in place.

    Args:
        tokens: the router's input, `(N, in)`.
        router: `(E, in)`, float32 or wider.
        hidden: the output of A, `(E*r, N)`, contiguous.
        settings: top_k, scaling and router are read.
    """
    gates = _native_gates(tokens, router, hidden, settings)
    if gates is not None:
        return gates
    logits = router_logits_by_expert(tokens, router)
    gate_values, expert_indices = route_dense(settings.router, logits, settings.top_k, 0)
    weights = gate_values.mul_(settings.scaling)
    hidden.view(len(router), len(hidden) // len(router), -1).mul_(weights.to(hidden.dtype).unsqueeze(1))
    return Gates(logits, weights, expert_indices)


def gates_backward(
    grad_gated: torch.Tensor,
    gated: torch.Tensor,
    weights: torch.Tensor,
    logits: torch.Tensor | None,
    grad_logits: torch.Tensor | None,
    settings: MixtureSettings,
) -> torch.Tensor:
    """Gradients of the output of A and, below them, of the router logits: `(E*r + E, N)` in the dtype of `gated`.

    With `h` the output of A, `a_e = w_e h_e` the gated output and `t` the gradient of `a`: `dh_e = w_e t_e`. For the
    gradient of the logits see `mola.tuner.routing.top_k_softmax_backward`, with `v_e = <t_e, a_e>`.

    Args:
        grad_gated: `t`, `(E*r, N)`.
        gated: `a`, `(E*r, N)`.
        weights: `w`, `(E, N)`; 0 for experts that were not chosen, whose gradients are then 0.
        logits: `(E, N)`, needed only for routers other than the default one.
        grad_logits: gradient of the logits from the router losses, `(E, N)`.
        settings: top_k, scaling and router are read.
    """
    (size, num_tokens), num_experts = gated.shape, len(weights)
    both = gated.new_empty(size + num_experts, num_tokens)
    if _native_gates_backward(grad_gated, gated, weights, grad_logits, both, settings):
        keep_losses_only(both[size:], grad_logits, settings)
        return both
    by_expert = num_experts, size // num_experts, -1
    # In float16 the products could overflow.
    first = grad_gated.float() if gated.dtype is torch.float16 else grad_gated
    grad_log_gates = (first * gated).view(by_expert).sum(1, dtype=weights.dtype)
    if settings.router == DEFAULT_ROUTER:
        top_k_softmax_backward(grad_log_gates, weights, settings.scaling, grad_logits, out=both[size:])
        keep_losses_only(both[size:], grad_logits, settings)
    else:
        assert logits is not None
        grad_of_gates = router_backward(settings.router, logits, settings.top_k, grad_log_gates)
        both[size:] = grad_of_gates if grad_logits is None else grad_of_gates + grad_logits
    torch.mul(grad_gated.view(by_expert), weights.to(gated.dtype).unsqueeze(1), out=both[:size].view(by_expert))
    return both


def keep_losses_only(
    gradient: torch.Tensor, grad_logits: torch.Tensor | None, settings: MixtureSettings
) -> torch.Tensor:
    """With `top_k` 1, reduce the gradient of the logits `(E, N)` to the part from router losses, in place.

    The only gate is then 1, so the rest of the gradient, `v - w v / scaling`, is only rounding error. An optimiser
    such as AdamW would scale that up to the size of any other gradient.
    """
    if settings.top_k > 1:
        return gradient
    return gradient.zero_() if grad_logits is None else gradient.copy_(grad_logits)


def _native_gates(tokens: torch.Tensor, router: torch.Tensor, hidden: torch.Tensor, settings: MixtureSettings) -> Any:
    """`apply_gates` as one native function; None if no native function fits the tensors."""
    if router.dtype != torch.float32 or not _may_be_native(settings, tokens, router, hidden):
        return None
    if router.shape[1] != tokens.shape[1] or len(hidden) % len(router):
        return None  # torch raises its own error
    functions = native.load("jit_gates")
    kernel = None if functions is None else functions.gates_kernel(tokens.dtype, hidden.dtype)
    if kernel is None:
        return None
    (num_experts, in_features), num_tokens, top_k = router.shape, len(tokens), settings.top_k
    tokens, router = tokens.contiguous(), router.contiguous()
    logits, weights = (torch.empty((num_experts, num_tokens), dtype=torch.float32, device="cpu") for _ in range(2))
    expert_indices = torch.empty((top_k, num_tokens), dtype=torch.int64, device="cpu")
    tensors = tokens, router, hidden, logits, weights, expert_indices
    addresses = [tensor.data_ptr() for tensor in tensors]
    kernel(*addresses, num_tokens, in_features, num_experts, len(hidden) // num_experts, top_k, settings.scaling)
    return Gates(logits, weights, expert_indices)


def _native_gates_backward(
    grad_gated: torch.Tensor,
    gated: torch.Tensor,
    weights: torch.Tensor,
    grad_logits: torch.Tensor | None,
    both: torch.Tensor,
    settings: MixtureSettings,
) -> bool:
    """Fill `both`, the result of `gates_backward`, by one native function; False if no native function fits."""
    if weights.dtype != torch.float32 or not _may_be_native(settings, grad_gated, gated, weights):
        return False
    functions = native.load("jit_gates")
    kernel: Any = None if functions is None else functions.gradient_kernel(gated.dtype)
    if kernel is None:
        return False
    (size, num_tokens), num_experts = gated.shape, len(weights)
    if grad_logits is not None:
        grad_logits = grad_logits.to(torch.float32).contiguous()
    grad_gated, gated, weights = grad_gated.contiguous(), gated.contiguous(), weights.contiguous()
    losses_address = 0 if grad_logits is None else grad_logits.data_ptr()
    addresses = grad_gated.data_ptr(), gated.data_ptr(), weights.data_ptr(), losses_address, both.data_ptr()
    kernel(*addresses, num_tokens, num_experts, size // num_experts, settings.scaling)
    return True


def _may_be_native(settings: MixtureSettings, *tensors: torch.Tensor) -> bool:
    return (
        settings.router == DEFAULT_ROUTER
        and are_plain_cpu_tensors(*tensors)
        and torch.get_num_threads() <= _MAX_THREADS
    )

"""Gates of many tokens and their gradient as one native function each, which use one thread."""

from __future__ import annotations

from typing import Any

import torch

from mola.tuner.kernels import native
from mola.tuner.kernels.api import MixtureSettings
from mola.tuner.kernels.cpu.tensors import are_plain_cpu_tensors
from mola.tuner.routing import DEFAULT_ROUTER

_MAX_THREADS = 2  # with more of them torch's router product, which shares its work, catches up


def apply_gates(tokens: torch.Tensor, router: torch.Tensor, hidden: torch.Tensor, settings: MixtureSettings):
    """Logits, weights and choices as `mola.tuner.kernels.gates.Gates` has them; None where there is no function."""
    if router.dtype != torch.float32 or not _is_native(settings, tokens, router, hidden):
        return None
    if router.shape[1] != tokens.shape[1] or len(hidden) % len(router):
        return None  # operators of torch say what does not fit
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
    return logits, weights, expert_indices


def gates_backward(
    grad_gated: torch.Tensor,
    gated: torch.Tensor,
    weights: torch.Tensor,
    grad_logits: torch.Tensor | None,
    both: torch.Tensor,
    settings: MixtureSettings,
) -> bool:
    """Fill `both` as `mola.tuner.kernels.gates.gates_backward` returns it; False where there is no function."""
    if weights.dtype != torch.float32 or not _is_native(settings, grad_gated, gated, weights):
        return False
    functions = native.load("jit_gates")
    kernel: Any = None if functions is None else functions.gradient_kernel(gated.dtype)
    if kernel is None:
        return False
    (size, num_tokens), num_experts = gated.shape, len(weights)
    if grad_logits is not None:
        grad_logits = grad_logits.to(torch.float32).contiguous()
    grad_gated, gated, weights = grad_gated.contiguous(), gated.contiguous(), weights.contiguous()
    extra = 0 if grad_logits is None else grad_logits.data_ptr()
    addresses = grad_gated.data_ptr(), gated.data_ptr(), weights.data_ptr(), extra, both.data_ptr()
    kernel(*addresses, num_tokens, num_experts, size // num_experts, settings.scaling)
    return True


def _is_native(settings: MixtureSettings, *tensors: torch.Tensor) -> bool:
    return (
        settings.router == DEFAULT_ROUTER
        and are_plain_cpu_tensors(*tensors)
        and torch.get_num_threads() <= _MAX_THREADS
    )

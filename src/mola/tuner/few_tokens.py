"""A mixture for few tokens without gradients on the CPU, as when text is generated: calls cost more than arithmetic.

In operators of torch; with numba `mola.tuner.native_few` takes its place.

- The thin products are made in float32 for narrower formats too: that is faster for few rows, and more exact.
- Experts are chosen by one sort, and nothing is kept for a backward pass.
"""

from __future__ import annotations

import torch

from mola.tuner.pieces import as_rows
from mola.tuner.products import base_output
from mola.tuner.routing import largest_first

MAX_TOKENS = 32


def is_few(x: torch.Tensor) -> bool:
    """Whether `x: (..., in)` is computed this way when no gradient is asked for."""
    return x.is_cpu and 0 < x.numel() <= MAX_TOKENS * x.shape[-1] and not torch.is_autocast_enabled("cpu")


def gates_of_few(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`mola.tuner.routing.choose_gates` with tokens first: gates `(N, E)`, chosen experts `(N, top_k)`."""
    num_experts = logits.shape[1]
    if top_k == num_experts:
        return torch.softmax(logits, dim=-1), torch.arange(num_experts, device=logits.device).expand_as(logits)
    largest, expert_indices = largest_first(logits, top_k)
    gates = torch.zeros_like(logits).scatter_(1, expert_indices, torch.softmax(largest, dim=-1))
    return gates, expert_indices


def compute_few(result, weight, bias, x, experts_A, experts_B, router, settings):
    """The computation of `add_mixture` without dropout; its three results."""
    num_experts, r, _ = experts_A.shape
    dtype = torch.promote_types(settings.dtype, torch.float32)
    inputs = as_rows(x).to(dtype)
    logits = torch.mm(inputs, router.to(dtype).t())  # (N, E)
    hidden = torch.mm(inputs, experts_A.flatten(0, 1).to(dtype).t())  # (N, E*r)
    gates, expert_indices = gates_of_few(logits, settings.top_k)
    hidden.view(-1, num_experts, r).mul_(gates.unsqueeze(-1))
    output = base_output(result, weight, bias, x.to(settings.dtype))
    rows = output.view(-1, output.shape[-1])
    matrix_B = experts_B.flatten(0, 1)
    if rows.dtype == matrix_B.dtype == dtype:
        rows.addmm_(hidden, matrix_B, alpha=settings.scaling)
    else:
        rows.add_(torch.mm(hidden, matrix_B.to(dtype)), alpha=settings.scaling)
    return output, logits.t(), expert_indices.t()

"""From router logits to gates: how experts are chosen. `mola.tuner.native` does the same for itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Routing(NamedTuple):
    """What a router decided for `N` tokens.

    Attributes:
        expert_indices: chosen experts, largest logit first, integers `(N, top_k)`; all experts in their own order
            where there is nothing to choose.
        routing_weights: gates of the chosen experts, float32 `(N, top_k)`, each row sums to 1.
    """

    expert_indices: torch.Tensor
    routing_weights: torch.Tensor


def router_logits(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Router logits `x Wr^T` in float32 (float64 for float64 input), whatever autocast is around.

    In bfloat16 near-ties fall the other way and some tokens would pick other experts.

    Args:
        hidden_states: `(..., in)`.
        weight: `(E, in)`.

    Returns:
        float32 `(N, E)` with the leading dimensions flattened.
    """
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    device = tokens.device.type
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        with torch.autocast(device_type=device, enabled=False):
            return F.linear(tokens.to(dtype), weight.to(dtype))
    return F.linear(tokens.to(dtype), weight.to(dtype))


def top_k_softmax(logits: torch.Tensor, top_k: int) -> Routing:
    r"""The paper's router: softmax over all experts, keep the `top_k` largest, renormalise.

        p = softmax(z),   S = the top_k largest,   g_e = p_e / sum_{S} p    (paper, section 3.1)

    Renormalised probabilities equal the softmax over the chosen logits, which is what is computed.
    Of equal logits the lower index is chosen, so that every device and batch size agrees.

    Args:
        logits: float32 `(N, E)`.
        top_k: experts per token, `1 <= top_k <= E`.
    """
    if top_k == logits.shape[-1]:
        everyone = torch.arange(top_k, device=logits.device).expand(logits.shape)
        return Routing(everyone, torch.softmax(logits, dim=-1))
    _, expert_indices = largest_logits(logits.detach(), top_k, dim=-1)
    return Routing(expert_indices, torch.softmax(logits.gather(-1, expert_indices), dim=-1))


def dense_gates(routing: Routing, num_experts: int) -> torch.Tensor:
    """Gates of all experts, zero where not chosen: float32 `(N, num_experts)`."""
    weights = routing.routing_weights
    return weights.new_zeros(weights.shape[0], num_experts).scatter(1, routing.expert_indices, weights)


def logits_by_expert(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`router_logits` with experts first, `(E, N)`, for code that autograd does not record.

    Args:
        tokens: `(N, in)`.
        weight: `(E, in)`.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    logits = torch.empty(weight.shape[0], tokens.shape[0], dtype=dtype, device=tokens.device)
    # Autocast leaves operators with `out` alone.
    return torch.mm(weight.to(dtype), tokens.to(dtype).t(), out=logits)


def choose_gates(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_k_softmax` with experts first, and with zeros for the experts that were not chosen.

    Args:
        logits: float32 `(E, N)`.
        top_k: experts per token.

    Returns:
        Gates, float32 `(E, N)`, and chosen experts in any order, integers `(top_k, N)`.
    """
    num_experts, num_tokens = logits.shape
    if top_k == num_experts:  # nothing to choose
        return torch.softmax(logits, dim=0), torch.arange(top_k, device=logits.device)[:, None].expand(-1, num_tokens)
    largest, expert_indices = largest_logits(logits, top_k, dim=0)
    return torch.zeros_like(logits).scatter_(0, expert_indices, torch.softmax(largest, dim=0)), expert_indices


def largest_first(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`largest_logits` along the last dimension by one sort, which is faster for few tokens."""
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[..., :count], indices[..., :count]


def largest_logits(logits: torch.Tensor, count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits along `dim` and where they are; of equal ones the first.

    Not torch.topk, which leaves the order among ties open; max returns the first of equal values.
    """
    values: list[torch.Tensor] = []
    indices: list[torch.Tensor] = []
    for _ in range(count):
        if indices:
            logits = logits.scatter(dim, indices[-1], float("-inf"))
        value, index = logits.max(dim, keepdim=True)
        values.append(value)
        indices.append(index)
    return torch.cat(values, dim), torch.cat(indices, dim)


def router_entropies(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """Entropy of the softmax along `dim` over its largest value `log E`: one dimension less than `logits`."""
    log_probabilities = torch.log_softmax(logits, dim)
    return -(log_probabilities.exp() * log_probabilities).sum(dim) / math.log(logits.shape[dim])


def jitter(hidden_states: torch.Tensor, noise: float) -> torch.Tensor:
    """Multiply by uniform noise from `[1 - noise, 1 + noise]` (Switch Transformers, section 2.2)."""
    return hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - noise, 1.0 + noise)

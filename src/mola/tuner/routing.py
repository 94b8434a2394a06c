"""From router logits to gates: the one place that knows how experts are chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Routing(NamedTuple):
    """What a router decided for `N` tokens.

    Attributes:
        expert_indices: chosen experts, largest logit first, integers `(N, top_k)`.
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
    remaining = logits.detach()
    chosen: list[torch.Tensor] = []
    # Not torch.topk, which leaves the order among ties open; max returns the first of equal values.
    for count in range(top_k):
        if count:
            remaining = remaining.scatter(1, chosen[-1], float("-inf"))
        chosen.append(remaining.max(dim=-1, keepdim=True).indices)
    expert_indices = torch.cat(chosen, dim=-1)
    return Routing(expert_indices, torch.softmax(logits.gather(1, expert_indices), dim=-1))


def dense_gates(routing: Routing, num_experts: int) -> torch.Tensor:
    """Gates of all experts, zero where not chosen: float32 `(N, num_experts)`."""
    weights = routing.routing_weights
    return weights.new_zeros(weights.shape[0], num_experts).scatter(1, routing.expert_indices, weights)


def choose_gates(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of all experts, zero where not chosen, and the chosen ones in any order: the router in one call.

    Args:
        logits: float32 `(N, E)`.
        top_k: experts per token.

    Returns:
        float32 `(N, E)`, integers `(N, top_k)`.
    """
    num_experts = logits.shape[1]
    if top_k == num_experts:  # nothing to choose
        return torch.softmax(logits, dim=-1), torch.arange(top_k, device=logits.device).expand(logits.shape)
    routing = top_k_softmax(logits, top_k)
    return dense_gates(routing, num_experts), routing.expert_indices


def jitter(hidden_states: torch.Tensor, noise: float) -> torch.Tensor:
    """Multiply by uniform noise from `[1 - noise, 1 + noise]` (Switch Transformers, section 2.2)."""
    return hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - noise, 1.0 + noise)

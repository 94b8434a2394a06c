"""Balance loss and z-loss: from the outputs of routers to sums over tokens, and from the sums to losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class RouterOutput(NamedTuple):
    """Output of one router for `N` tokens, or of `R` routers with a leading dimension `R`.

    Attributes:
        logits: `(N, E)`.
        expert_indices: chosen experts `(N, top_k)`.
    """

    logits: torch.Tensor
    expert_indices: torch.Tensor


class RouterStatistics(NamedTuple):
    """Sums over the tokens of one router that count; sums of routers with equal numbers of experts may be added.

    All are float32. Statistics of `R` routers have a leading dimension `R`.

    Attributes:
        expert_counts: how often each expert was chosen, `(E,)`, without gradient.
        probability_sum: softmax over all experts, summed over tokens, `(E,)`.
        z_sum: squared log-sum-exp of the logits, summed over tokens, scalar.
        num_tokens: number of tokens that count, scalar.
    """

    expert_counts: torch.Tensor
    probability_sum: torch.Tensor
    z_sum: torch.Tensor
    num_tokens: torch.Tensor


def router_statistics(output: RouterOutput, token_mask: torch.Tensor | None = None) -> RouterStatistics:
    """Sums over the tokens of one router or of several routers.

    Args:
        output: logits and chosen experts.
        token_mask: `(N,)`, 1 for tokens that count; None counts all.
    """
    logits = output.logits
    chosen = torch.zeros_like(logits).scatter(-1, output.expert_indices, 1.0)
    probabilities = torch.softmax(logits, dim=-1)
    z = torch.logsumexp(logits, dim=-1).square()
    routers = logits.shape[:-2]
    if token_mask is None:
        num_tokens = torch.full(routers, float(logits.shape[-2]), device=logits.device)
    else:
        mask = token_mask.to(logits.device, logits.dtype)
        chosen, probabilities, z = chosen * mask.unsqueeze(-1), probabilities * mask.unsqueeze(-1), z * mask
        num_tokens = mask.sum().expand(routers)
    return RouterStatistics(chosen.sum(-2), probabilities.sum(-2), z.sum(-1), num_tokens)


def pool(statistics: Iterable[RouterStatistics]) -> RouterStatistics:
    """Sum of the statistics of several routers with the same number of experts."""
    return RouterStatistics(*(torch.stack(column).sum(0) for column in zip(*statistics, strict=True)))


def balance_loss(statistics: RouterStatistics) -> torch.Tensor:
    r"""Load-balancing loss of each router, or of pooled routers.

        loss = E * sum_e f_e P_e

    with `f_e` the share of expert `e` in all choices (no gradient) and `P_e` its mean probability: 1 if all experts are
    used equally, E at most, and 0 if no token counts.

    Source: Switch Transformers (Fedus et al. 2021), equations 4 to 6, with `top_k` choices per token.
    """
    num_experts = statistics.expert_counts.shape[-1]
    share = statistics.expert_counts / statistics.expert_counts.sum(-1, keepdim=True).clamp(min=1.0)
    mean_probability = statistics.probability_sum / statistics.num_tokens.clamp(min=1.0).unsqueeze(-1)
    return num_experts * (share * mean_probability).sum(-1)


def z_loss(statistics: RouterStatistics) -> torch.Tensor:
    """Mean over tokens of `logsumexp(z)^2`, which keeps router logits small (ST-MoE, equation 5)."""
    return statistics.z_sum / statistics.num_tokens.clamp(min=1.0)

"""Output of routers in one forward pass, its sums over tokens, and the losses of these sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import nn


class RouterOutput(NamedTuple):
    """Output of one router for `N` tokens, or of `R` routers with a leading dimension `R`.

    Attributes:
        logits: `(N, E)`.
        expert_indices: chosen experts `(N, top_k)`.
    """

    logits: torch.Tensor
    expert_indices: torch.Tensor


class RouterCollector(Protocol):
    """`RouterLosses` as a layer sees it: while `collecting`, layers keep their router's output for it."""

    model: nn.Module
    collecting: bool


class RouterObserver(Protocol):
    """A recorder of router outputs in training, see `mola.insight`."""

    @property
    def collecting(self) -> bool:
        """Whether this forward pass is recorded."""

    def observe(self, adapter_name: str, output: RouterOutput) -> None:
        """Receive the router's output of one call of a layer."""


class RouterStatistics(NamedTuple):
    """Sums over the counted tokens of one router; sums of several routers with equal `E` may be added.

    All are float32. Statistics of `R` routers have a leading dimension `R`.

    Attributes:
        expert_counts: how often each expert was chosen, `(E,)`, without gradient.
        probability_sum: softmax over all experts, summed over tokens, `(E,)`.
        z_sum: squared log-sum-exp of the logits, summed over tokens, scalar.
        num_tokens: counted tokens, scalar.
    """

    expert_counts: torch.Tensor
    probability_sum: torch.Tensor
    z_sum: torch.Tensor
    num_tokens: torch.Tensor


def router_statistics(output: RouterOutput, token_mask: torch.Tensor | None = None) -> RouterStatistics:
    """Reduce the output of one router, or of several, to sums over the tokens.

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

    with `f_e` the share of all assignments that went to expert `e` (no gradient) and `P_e` its mean
    probability: 1 when perfectly even, at most E. 0 when no token counts.

    Source: Switch Transformers (Fedus et al. 2021), equations 4 to 6, with `top_k` assignments per token.
    """
    num_experts = statistics.expert_counts.shape[-1]
    share = statistics.expert_counts / statistics.expert_counts.sum(-1, keepdim=True).clamp(min=1.0)
    mean_probability = statistics.probability_sum / statistics.num_tokens.clamp(min=1.0).unsqueeze(-1)
    return num_experts * (share * mean_probability).sum(-1)


def z_loss(statistics: RouterStatistics) -> torch.Tensor:
    """Mean over tokens of `logsumexp(z)^2`, which keeps router logits small (ST-MoE, equation 5)."""
    return statistics.z_sum / statistics.num_tokens.clamp(min=1.0)

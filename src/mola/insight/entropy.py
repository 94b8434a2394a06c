"""How undecided routers are."""

from __future__ import annotations

import math

import torch


def router_entropies(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """Entropy of the softmax along `dim` over its largest value `log E`: one dimension less than `logits`."""
    log_probabilities = torch.log_softmax(logits, dim)
    return -(log_probabilities.exp() * log_probabilities).sum(dim) / math.log(logits.shape[dim])

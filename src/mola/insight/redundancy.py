"""How different the experts of a module are, from their factors: no product `B A` is formed."""

from __future__ import annotations

import torch

from mola.insight.factors import inner_products


def expert_distances(experts_A: torch.Tensor, experts_B: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    r"""Frobenius distances between the updates of a module's experts, the paper's measure of redundancy.

        D_ij = scaling * || B_i A_i - B_j A_j ||_F

    From `mola.insight.factors.inner_products`.

    Args:
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        scaling: `lora_alpha / r` of the adapter.

    Returns:
        float64 `(E, E)`, symmetric, 0 on the diagonal.
    """
    inner = inner_products(experts_A, experts_B)
    norms = inner.diagonal()
    squared = norms.unsqueeze(0) + norms.unsqueeze(1) - 2 * inner
    return squared.clamp_min(0).sqrt().mul(scaling).fill_diagonal_(0)


def mean_pairwise(matrix: torch.Tensor) -> float:
    """Mean over all pairs of different experts of a symmetric `(E, E)` matrix; NaN with one expert."""
    num_experts = matrix.shape[0]
    pairs = torch.triu_indices(num_experts, num_experts, offset=1)
    return matrix[pairs[0], pairs[1]].mean().item()


def subspace_overlaps(stack: torch.Tensor) -> torch.Tensor:
    r"""How much the experts' factors span the same directions.

        O_ij = || Q_i^T Q_j ||_F^2 / min(rank_i, rank_j)

    `Q_i` is an orthonormal basis of the rows of factor `i`. 1: the smaller space lies in the other one; 0: they are
    orthogonal; two random spaces of `r` directions among `n` have `r / n`.

    Args:
        stack: `(E, r, features)`: the A matrices for what experts read, the B matrices for what they write.

    Returns:
        float64 `(E, E)`; NaN where a factor is zero.
    """
    _, lengths, directions = torch.linalg.svd(stack.detach().double(), full_matrices=False)
    smallest = lengths[:, :1] * max(stack.shape[1:]) * torch.finfo(torch.float32).eps
    is_spanned = lengths > smallest  # (E, r)
    basis = directions * is_spanned.unsqueeze(-1)
    cosines = torch.einsum("iaf,jbf->iajb", basis, basis)
    ranks = is_spanned.sum(1)
    return cosines.square().sum((1, 3)) / torch.minimum(ranks.unsqueeze(0), ranks.unsqueeze(1))

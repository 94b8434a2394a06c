"""How different the experts of a module are, computed from their factors without forming a product `B A`."""

import functools

import torch

_COLUMNS_AT_ONCE = 1024


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on its device. A tensor on MPS, which has no float64, is moved to the CPU first."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def expert_distances(experts_A: torch.Tensor, experts_B: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    r"""Frobenius distances between the updates of a module's experts, the paper's measure of redundancy.

        D_ij = scaling * || B_i A_i - B_j A_j ||_F

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

    `Q_i` is an orthonormal basis of the rows of factor `i`. 1: the smaller space lies in the larger one; 0: they are
    orthogonal; two random spaces of `r` directions among `n` have `r / n`.

    Args:
        stack: `(E, r, features)`: the A matrices for what experts read, the B matrices for what they write.

    Returns:
        float64 `(E, E)`; NaN if a factor is zero.
    """
    _, lengths, directions = torch.linalg.svd(in_float64(stack.detach()), full_matrices=False)
    smallest = lengths[:, :1] * max(stack.shape[1:]) * torch.finfo(torch.float32).eps
    is_spanned = lengths > smallest  # (E, r)
    basis = directions * is_spanned.unsqueeze(-1)
    cosines = torch.einsum("iaf,jbf->iajb", basis, basis)
    ranks = is_spanned.sum(1)
    return cosines.square().sum((1, 3)) / torch.minimum(ranks.unsqueeze(0), ranks.unsqueeze(1))


def inner_products(experts_A: torch.Tensor, experts_B: torch.Tensor) -> torch.Tensor:
    """Inner products of the updates of a module's experts.

        <B_i A_i, B_j A_j> = sum over the entries of (B_i^T B_j) * (A_i A_j^T)

    Only two `(E r, E r)` matrices are formed; a single update would have `out * in` entries.

    Args:
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.

    Returns:
        float64 `(E, E)`, the squared Frobenius norms on the diagonal.
    """
    num_experts, r, _ = experts_A.shape
    product = _gram(experts_A) * _gram(experts_B)
    return product.view(num_experts, r, num_experts, r).sum((1, 3))


def _gram(stack: torch.Tensor) -> torch.Tensor:
    """Inner products of all rows, float64 `(E r, E r)`, without copying the whole stack."""
    rows = stack.detach().flatten(0, 1)
    # float64, because the squared distance of similar experts is a small difference of large numbers.
    products = (columns @ columns.t() for columns in map(in_float64, rows.split(_COLUMNS_AT_ONCE, dim=1)))
    return functools.reduce(torch.Tensor.add_, products)

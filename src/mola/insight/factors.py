"""Inner products of updates `B A` from their factors: no product is formed."""

from __future__ import annotations

import torch

_COLUMNS = 1024  # that are taken at once


def inner_products(experts_A: torch.Tensor, experts_B: torch.Tensor) -> torch.Tensor:
    r"""Inner products of the updates of a module's experts.

        <B_i A_i, B_j A_j> = sum over the entries of (B_i^T B_j) * (A_i A_j^T)

    Two `(E r, E r)` matrices are all that is needed; an update alone would have `out * in` entries.

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
    """Inner products of all rows, float64 `(E r, E r)`, without a copy of the stack as a whole."""
    rows = stack.detach().flatten(0, 1)
    # float64: the squared distance of like experts is a small difference of large numbers.
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(_COLUMNS, dim=1):
        columns = part.double()
        gram.addmm_(columns, columns.t())
    return gram

"""Products of two factors cut to a lower rank; nothing of the size of the product is formed."""

from __future__ import annotations

import torch


def cut(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest product of rank `rank` to `left @ right`, in the Frobenius norm.

    Args:
        left: float64 `(out, m)`.
        right: float64 `(m, in)`.
        rank: wanted; factors have fewer columns where the product has no such rank.

    Returns:
        `B (out, rank)` and `A (rank, in)`, with singular values shared evenly.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    u, values, v = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    root = values[:rank].sqrt()
    return (q_left @ u[:, :rank]) * root, (root.unsqueeze(1) * v[:rank]) @ q_right.t()


def square_root(second: torch.Tensor, ridge: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower triangular `L` with `L L^T = C = second + diag(lambda)`, and `lambda (in,)`.

        lambda_i = ridge * mean of the diagonal + ridge / 10 * second_ii

    The second part is for a few inputs of a language model that are thousands of times the others: float32 products of
    these are less exact than the first part is large, and `C` would not be positive.

    Args:
        second: float64 `(in, in)`, the sum of `x x^T`; `lambda` is added to it in place.
        ridge: see above.
    """
    diagonal = second.diagonal()
    # Inputs that are always zero say nothing; any positive number makes the matrix invertible.
    added = ridge * (diagonal.mean() + diagonal / 10) if diagonal.any() else torch.ones_like(diagonal)
    diagonal += added
    return torch.linalg.cholesky(second), added


def solve(root: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """`cross C^-1`, for `root` as `square_root` gives it: the full solution of a regression."""
    return torch.cholesky_solve(cross.t(), root).t()


def regression(
    root: torch.Tensor, cross: torch.Tensor, left: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Reduced-rank regression of `y = left h` on `x`, from second moments, towards an update `left D`.

        min over B (out, rank), A (rank, in) of  sum ||left h - B A x||^2 + ||(left D - B A) diag(lambda)^1/2||^2

    The full solution is `W = left (sum h x^T + D diag(lambda)) C^-1`, and the best one of a lower rank that of `W L`,
    mapped back. With `D = 0` this is ridge regression.

    Args:
        root: `L` of `square_root`.
        cross: float64 `(m, in)`, the sum of `h x^T`, plus `D * lambda`.
        left: float64 `(out, m)`.
        rank: as in `cut`.

    Returns:
        `B` and `A`, as `cut`.
    """
    whitened = torch.linalg.solve_triangular(root, cross.t(), upper=False).t()
    B, A = cut(left, whitened, rank)
    return B, torch.linalg.solve_triangular(root.t(), A.t(), upper=True).t()

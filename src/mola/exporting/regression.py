"""Computes the low-rank update that replaces the experts of a linear: their mean, or the nearest update on data.

No matrix as large as a weight is formed: all products are kept as two factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mola.exporting.calibration import Row, answer_weights, token_ids
from mola.exporting.mixtures import Mixture, Update, as_loras, gated_hidden, replaced_by_loras
from mola.exporting.moments import gather_moments, group_by_input, moment_bytes, split_by_memory
from mola.exporting.options import ConvertOptions
from mola.tuner.layer import MolaLinear

_RIDGE = 1e-4  # a smaller value trusts the data more; chosen from 1e-2 to 1e-5 on held-out rows


def cut_rank(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of rank `rank` that is nearest to `left @ right` in the Frobenius norm.

    Args:
        left: float64 `(out, m)`.
        right: float64 `(m, in)`.
        rank: rank of the result; the result has fewer columns if `m`, `in` or `out` is smaller.

    Returns:
        `B (out, rank)` and `A (rank, in)`; both include the square roots of the singular values.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    u, values, v = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    root = values[:rank].sqrt()
    return (q_left @ u[:, :rank]) * root, (root.unsqueeze(1) * v[:rank]) @ q_right.t()


def ridge_cholesky(second: torch.Tensor, ridge: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower triangular `L` with `L L^T = C = second + diag(lambda)`, and `lambda (in,)`.

        lambda_i = ridge * mean of the diagonal + ridge / 10 * second_ii

    The second term is for language models in which a few inputs are thousands of times larger than the others. Without
    this term, the rounding errors of these inputs' float32 products exceed the first term, and `C` is not positive
    definite.

    Args:
        second: float64 `(in, in)`, the sum of `x x^T`; `lambda` is added to it in place.
        ridge: factor of `lambda`.
    """
    diagonal = second.diagonal()
    # If all inputs are zero, any positive number makes the matrix invertible.
    added = ridge * (diagonal.mean() + diagonal / 10) if diagonal.any() else torch.ones_like(diagonal)
    diagonal += added
    return torch.linalg.cholesky(second), added


def solve_full(root: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """`cross C^-1`, the full-rank solution of a regression, for `root` as `ridge_cholesky` returns it."""
    return torch.cholesky_solve(cross.t(), root).t()


def solve_low_rank(
    root: torch.Tensor, cross: torch.Tensor, left: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Reduced-rank regression of `y = left h` on `x`, from second moments, with a ridge towards an update `left D`.

        min over B (out, rank), A (rank, in) of  sum ||left h - B A x||^2 + ||(left D - B A) diag(lambda)^1/2||^2

    The full-rank solution is `W = left (sum h x^T + D diag(lambda)) C^-1`. The best solution of a lower rank is the
    best low-rank approximation of `W L`, times `L^-1`. With `D = 0` this is ridge regression.

    Args:
        root: `L` of `ridge_cholesky`.
        cross: float64 `(m, in)`, the sum of `h x^T`, plus `D * lambda`.
        left: float64 `(out, m)`.
        rank: see `cut_rank`.

    Returns:
        `B` and `A`; see `cut_rank`.
    """
    whitened = torch.linalg.solve_triangular(root, cross.t(), upper=False).t()
    B, A = cut_rank(left, whitened, rank)
    return B, torch.linalg.solve_triangular(root.t(), A.t(), upper=True).t()


def mean_of_experts(mixture: Mixture, rank: int, gates: torch.Tensor | None = None) -> Update:
    """The mean of the experts, weighted by `gates (E,)` if given, cut to a rank; a single expert stays as it is."""
    num_experts = len(mixture.A)
    if num_experts == 1:
        return mixture.B[0].t(), mixture.A[0]
    weights = torch.full((num_experts,), 1 / num_experts) if gates is None else gates / gates.sum()
    return cut_rank(mixture.left(weights), mixture.right(), rank)


def fit_updates(
    model: Any,
    layers: Mapping[str, MolaLinear],
    experts: Mapping[str, Mixture],
    rows: Sequence[Row],
    options: ConvertOptions,
) -> tuple[dict[str, Update], list[str]]:
    """Fit one update to the experts of every linear by reduced-rank regression on data.

    Layers are fitted in parts, in the order in which the model computes them. Each part is fitted to the inputs it
    gets once the parts before it are converted.

    Args:
        model: the model with the mixture.
        layers: the adapted linears of the model.
        experts: the experts of the layers.
        rows: the data.
        options: `rank` of linears with several experts, `memory_gb` for moments (less memory makes more parts),
            `fit_passes` (the lowest number of parts) and `answer_weight`.

    Returns:
        The updates, and the names of linears that no token reached, which get the mean of their experts.
    """
    rank = int(options.rank or 0)
    tokens, weights = token_ids(rows), answer_weights(rows, options.answer_weight)
    updates = {name: mean_of_experts(experts[name], rank) for name in layers}
    several = {name: layer for name, layer in layers.items() if len(experts[name].A) > 1}
    groups = group_by_input(model, several, tokens[0][:1])
    sizes = [
        moment_bytes(experts[names[0]].A.shape[2], (experts[name].A[..., 0].numel() for name in names))
        for names in groups
    ]
    fitted: list[str] = []
    unreached: list[str] = []
    for part in split_by_memory(sizes, options.memory_gb * 1e9, options.fit_passes):
        names = [groups[index] for index in part]
        with replaced_by_loras(layers, as_loras(layers, {name: updates[name] for name in fitted})):
            found = gather_moments(
                model, layers, names, lambda name, x: gated_hidden(layers[name], experts[name].A, x), tokens, weights
            )
        for same_input in names:
            moments = found.pop(0)  # frees the memory of the moments one by one
            fitted += same_input
            if moments is None:
                unreached += same_input
                continue
            root, ridge = ridge_cholesky(moments.second, _RIDGE)
            for name in same_input:
                # The ridge pulls towards the mean of the experts, not towards zero.
                mean = experts[name].right().to(root.device) / len(experts[name].A)
                left = experts[name].left().to(root.device)
                B, A = solve_low_rank(root, moments.cross[name] + mean * ridge, left, rank)
                updates[name] = B.cpu(), A.cpu()
    return updates, unreached

"""Another number of experts for a trained module, with as little change of what it computes as possible.

Works on the tensors of a module alone. No update `B A` is formed: nothing grows with `out * in`.
"""

import math
from typing import NamedTuple

import torch

from mola.errors import MolaError
from mola.insight.redundancy import inner_products

SHRINK = ("drop", "merge")
GROW = ("copy", "fresh")
_ROW_NOISE = 0.05  # of a copied router row, in units of its norm


class Experts(NamedTuple):
    """The tensors of one module."""

    A: torch.Tensor  # `(E, r, in)`
    B: torch.Tensor  # `(E, r, out)`
    router: torch.Tensor | None  # `(E, in)`; None with one expert


def resize(
    experts: Experts,
    num_experts: int,
    generator: torch.Generator,
    use: torch.Tensor | None = None,
    *,
    shrink: str | None = None,
    grow: str = "copy",
) -> Experts:
    r"""Experts and router for another number of experts.

    - The same number: the same tensors.
    - From one to several: copies of the expert and a random router. Gates add up to 1, so the module computes what it
      did, exactly; the router makes the copies differ from the first step of training on.
    - Several to one: `low_rank_mean` of the updates, weighted by their use.
    - Fewer, "drop": those with the largest `m_e * ||B_e A_e||_F` stay as they are, in their order.
    - Fewer, "merge": the pair of least `m_i m_j / (m_i + m_j) * ||B_i A_i - B_j A_j||_F^2` becomes its weighted mean,
      updates and router rows, until the number is reached (Ward's clustering).
    - More, "fresh": A and router row random as in a new adapter, B zero; the others stay as they are.
    - More, "copy": the expert of largest use and a copy of it with a little noise on its router row, which share its
      use; repeated.

    Args:
        experts: of the module.
        num_experts: how many there shall be.
        generator: of random numbers, on the CPU.
        use: mean gates `m: (E,)`; None counts all alike, so that the lowest ones are copied first.
        shrink: one of `SHRINK`; None merges where the use is known and drops where it is not.
        grow: one of `GROW`.

    Returns:
        Tensors of the same dtypes; the router is float32.

    Raises:
        MolaError: fewer than one expert, or `use` of another number of experts.
    """
    count = len(experts.A)
    if num_experts < 1:
        raise MolaError(f"`num_experts` must be at least 1: got {num_experts}.")
    if use is not None and use.shape != (count,):
        raise MolaError(f"`use` must have one entry for each of {count} experts: got shape {tuple(use.shape)}.")
    if num_experts == count:
        return experts
    weights = torch.ones(count, dtype=torch.float64) if use is None else use.double().clamp_min(1e-9)
    if count == 1:
        return _copies(experts, num_experts, generator)
    if num_experts == 1:
        A, B = low_rank_mean(experts.A, experts.B, weights)
        return Experts(A.unsqueeze(0), B.unsqueeze(0), None)
    if num_experts < count:
        shrink = shrink or ("drop" if use is None else "merge")
        return (_dropped if shrink == "drop" else _merged)(experts, weights, num_experts)
    if grow == "fresh":
        return _with_fresh(experts, num_experts, generator)
    return _with_copies(experts, weights, num_experts, generator)


def low_rank_mean(
    experts_A: torch.Tensor, experts_B: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Factors of rank `r` nearest to the weighted mean of updates of rank `r`.

        B A ~ sum_e w_e B_e A_e / sum_e w_e        by the singular value decomposition, least in the Frobenius norm

    The mean is a product of two stacks of `E r` columns. With their QR decompositions `Q_1 R_1` and `Q_2 R_2` its
    singular values are those of `R_1 R_2^T`, a matrix of `E r` rows at most.

    Args:
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        weights: `(E,)`, at least 0.

    Returns:
        A `(r, in)` and B `(r, out)`, their norms in the mean proportion of the experts' norms: an optimiser's steps
        are as large for one as for the other.
    """
    r = experts_A.shape[1]
    wide_A, wide_B = experts_A.double(), experts_B.double()
    shares = (weights.double() / weights.sum())[:, None, None]
    basis_B, small_B = torch.linalg.qr((shares * wide_B).flatten(0, 1).t())  # (out, n), (n, E r)
    basis_A, small_A = torch.linalg.qr(wide_A.flatten(0, 1).t())
    left, values, right = torch.linalg.svd(small_B @ small_A.t(), full_matrices=False)
    kept = min(r, len(values))
    roots = values[:kept].sqrt().unsqueeze(1)
    A, B = torch.zeros_like(wide_A[0]), torch.zeros_like(wide_B[0])
    A[:kept] = roots * (right[:kept] @ basis_A.t())
    B[:kept] = roots * (left[:, :kept].t() @ basis_B.t())
    norm_A, norm_B = (stack.flatten(1).norm(dim=1).mean() for stack in (wide_A, wide_B))
    if A.norm() > 0 and norm_B > 0:
        factor = (norm_A / norm_B * B.norm() / A.norm()).sqrt()
        A, B = A * factor, B / factor
    elif not norm_B > 0:
        A = wide_A[0]  # untrained experts: with both factors zero nothing could ever be learnt
    return A.to(experts_A.dtype), B.to(experts_B.dtype)


def _dropped(experts: Experts, weights: torch.Tensor, num_experts: int) -> Experts:
    harm = weights * inner_products(experts.A, experts.B).diagonal().clamp_min(0).sqrt()
    kept = harm.sort(descending=True, stable=True).indices[:num_experts].sort().values
    return Experts(*(tensor[kept] for tensor in _all(experts)))


def _merged(experts: Experts, weights: torch.Tensor, num_experts: int) -> Experts:
    while len(experts.A) > num_experts:
        inner = inner_products(experts.A, experts.B)
        norms = inner.diagonal()
        together = weights.unsqueeze(1) * weights / (weights.unsqueeze(1) + weights)
        harm = together * (norms.unsqueeze(1) + norms - 2 * inner).clamp_min(0)
        pair = sorted(divmod(int(harm.fill_diagonal_(math.inf).argmin()), len(inner)))
        shares = weights[pair] / weights[pair].sum()
        A, B = low_rank_mean(experts.A[pair], experts.B[pair], shares)
        router = _router(experts)
        row = (shares.unsqueeze(1) * router[pair].double()).sum(0).to(router.dtype)
        others = [index for index in range(len(inner)) if index != pair[1]]
        new = [tensor.clone() for tensor in _all(experts)]
        for tensor, value in zip(new, (A, B, row), strict=True):
            tensor[pair[0]] = value
        weights = weights.clone()
        weights[pair[0]] += weights[pair[1]]
        experts, weights = Experts(*(tensor[others] for tensor in new)), weights[others]
    return experts


def _copies(experts: Experts, num_experts: int, generator: torch.Generator) -> Experts:
    A, B = (stack.repeat(num_experts, 1, 1) for stack in (experts.A, experts.B))
    return Experts(A, B, _random_rows(num_experts, experts.A.shape[2], generator))


def _with_fresh(experts: Experts, num_experts: int, generator: torch.Generator) -> Experts:
    missing, (_, r, features) = num_experts - len(experts.A), experts.A.shape
    rows = _random_rows(missing * (r + 1), features, generator)
    fresh = Experts(
        rows[missing:].view(missing, r, features).to(experts.A.dtype),
        experts.B.new_zeros(missing, *experts.B.shape[1:]),
        rows[:missing],
    )
    pairs = zip(_all(experts), _all(fresh), strict=True)
    return Experts(*(torch.cat([old, new.to(old.dtype)]) for old, new in pairs))


def _with_copies(experts: Experts, weights: torch.Tensor, num_experts: int, generator: torch.Generator) -> Experts:
    while len(experts.A) < num_experts:
        source = int(weights.argmax())
        A, B, row = (tensor[source] for tensor in _all(experts))
        noise = torch.randn(len(row), generator=generator)
        row = row + noise * (_ROW_NOISE * row.norm() / math.sqrt(len(row)))
        pairs = zip(_all(experts), (A, B, row), strict=True)
        experts = Experts(*(torch.cat([old, new.unsqueeze(0)]) for old, new in pairs))
        weights = torch.cat([weights, weights[source : source + 1] / 2])
        weights[source] /= 2
    return experts


def _random_rows(count: int, features: int, generator: torch.Generator) -> torch.Tensor:
    """As `MolaLinear.reset_parameters` draws them: uniform within `1 / sqrt(in)`."""
    bound = 1 / math.sqrt(features)
    return torch.empty(count, features).uniform_(-bound, bound, generator=generator)


def _router(experts: Experts) -> torch.Tensor:
    if experts.router is None:
        raise MolaError(f"a module with {len(experts.A)} experts must have a router: it has none. The file is broken.")
    return experts.router


def _all(experts: Experts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return experts.A, experts.B, _router(experts)

"""Changes the number of experts of a trained module, and changes the module's outputs as little as possible.

Only the module's tensors are used. No update `B A` is formed, so no tensor has the size `out * in`.
"""

import math
from typing import NamedTuple

import torch

from mola.errors import MolaError
from mola.insight.redundancy import inner_products

_ROW_NOISE = 0.05  # noise on a copied router row, in units of the row's norm


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
) -> Experts:
    r"""Change the number of experts of a module.

    - The same number: the tensors are left unchanged.
    - From one to several: copies of the expert and a random router. Gates add up to 1, so the module's outputs do not
      change; the router makes the copies differ from the first training step on.
    - From several to one: `low_rank_mean` of the updates, weighted by their use.
    - Fewer, use unknown: the experts with the largest `||B_e A_e||_F` are kept, in their order.
    - Fewer, use known: the pair with the least `m_i m_j / (m_i + m_j) * ||B_i A_i - B_j A_j||_F^2` is replaced by the
      weighted mean of its updates and router rows, until the number is reached (Ward's clustering).
    - More: the expert of largest use is copied, with a little noise on the copy's router row, and each of the two gets
      half of the use. This is repeated until the number is reached.

    Args:
        experts: the module's experts.
        num_experts: the new number of experts, at least 1.
        generator: generator of random numbers, on the CPU.
        use: mean gates `m: (E,)`; None treats all experts alike, so that the lowest ones are copied first.

    Returns:
        Tensors of the same dtypes; the router is float32.
    """
    count = len(experts.A)
    if num_experts == count:
        return experts
    weights = torch.ones(count, dtype=torch.float64) if use is None else use.double().clamp_min(1e-9)
    if count == 1:
        return _copy_only_expert(experts, num_experts, generator)
    if num_experts == 1:
        A, B = low_rank_mean(experts.A, experts.B, weights)
        return Experts(A.unsqueeze(0), B.unsqueeze(0), None)
    if num_experts < count:
        return _drop(experts, num_experts) if use is None else _merge(experts, weights, num_experts)
    return _add_copies(experts, weights, num_experts, generator)


def low_rank_mean(
    experts_A: torch.Tensor, experts_B: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Factors of rank `r` nearest to the weighted mean of updates of rank `r`, in the Frobenius norm.

        B A ~ sum_e w_e B_e A_e / sum_e w_e        by the singular value decomposition

    The mean is a product of two stacks of `E r` columns. With their QR decompositions `Q_1 R_1` and `Q_2 R_2` its
    singular values are those of `R_1 R_2^T`, a matrix of at most `E r` rows.

    Args:
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        weights: `(E,)`, at least 0.

    Returns:
        A `(r, in)` and B `(r, out)`. The ratio of their norms equals the ratio of the experts' mean norms, so that an
        optimiser's steps keep their relative size.
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
        A = wide_A[0]  # untrained experts: with both factors zero no gradient would arrive
    return A.to(experts_A.dtype), B.to(experts_B.dtype)


def _drop(experts: Experts, num_experts: int) -> Experts:
    norms = inner_products(experts.A, experts.B).diagonal().clamp_min(0).sqrt()
    kept = norms.sort(descending=True, stable=True).indices[:num_experts].sort().values
    return Experts(*(tensor[kept] for tensor in _tensors(experts)))


def _merge(experts: Experts, weights: torch.Tensor, num_experts: int) -> Experts:
    while len(experts.A) > num_experts:
        inner = inner_products(experts.A, experts.B)
        norms = inner.diagonal()
        pair_weights = weights.unsqueeze(1) * weights / (weights.unsqueeze(1) + weights)
        cost = pair_weights * (norms.unsqueeze(1) + norms - 2 * inner).clamp_min(0)
        first, second = pair = sorted(divmod(int(cost.fill_diagonal_(math.inf).argmin()), len(inner)))
        shares = weights[pair] / weights[pair].sum()
        A, B = low_rank_mean(experts.A[pair], experts.B[pair], shares)
        _, _, router = _tensors(experts)
        row = (shares.unsqueeze(1) * router[pair].double()).sum(0).to(router.dtype)
        merged = [tensor.clone() for tensor in _tensors(experts)]
        for tensor, value in zip(merged, (A, B, row), strict=True):
            tensor[first] = value
        weights = weights.clone()
        weights[first] += weights[second]
        kept = [index for index in range(len(inner)) if index != second]
        experts, weights = Experts(*(tensor[kept] for tensor in merged)), weights[kept]
    return experts


def _copy_only_expert(experts: Experts, num_experts: int, generator: torch.Generator) -> Experts:
    A, B = (stack.repeat(num_experts, 1, 1) for stack in (experts.A, experts.B))
    # Router rows are drawn as in `MolaLinear.reset_parameters`: uniformly within 1 / sqrt(in).
    features = experts.A.shape[2]
    bound = 1 / math.sqrt(features)
    return Experts(A, B, torch.empty(num_experts, features).uniform_(-bound, bound, generator=generator))


def _add_copies(experts: Experts, weights: torch.Tensor, num_experts: int, generator: torch.Generator) -> Experts:
    while len(experts.A) < num_experts:
        source = int(weights.argmax())
        A, B, row = (tensor[source] for tensor in _tensors(experts))
        noise = torch.randn(len(row), generator=generator)
        row = row + noise * (_ROW_NOISE * row.norm() / math.sqrt(len(row)))
        pairs = zip(_tensors(experts), (A, B, row), strict=True)
        experts = Experts(*(torch.cat([old, new.unsqueeze(0)]) for old, new in pairs))
        weights = torch.cat([weights, weights[source : source + 1] / 2])
        weights[source] /= 2
    return experts


def _tensors(experts: Experts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if experts.router is None:
        raise MolaError(f"a module with {len(experts.A)} experts must have a router, but has none. The file is broken.")
    return experts.A, experts.B, experts.router

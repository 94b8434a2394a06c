"""Fits routers in closed form: least squares that tell apart the inputs that each adapter gets on its own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from mola.architecture.linears import linear_sizes
from mola.exporting.calibration import Calibration, token_ids
from mola.exporting.moments import gather_moments, group_by_input, moment_bytes, split_by_memory, watch_inputs
from mola.exporting.regression import ridge_cholesky, solve_full

_MARGIN = 4.0  # mean lead of the correct expert's logit; with two experts this gives it a gate of 0.98


class Routers(NamedTuple):
    """Fitted routers; a module that no token reached is left out."""

    weights: dict[str, torch.Tensor]  # module -> float64 `(adapters, in)`
    right: dict[str, float]  # module -> share of held-out tokens whose own adapter has the largest logit


def solve_router(seconds: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    r"""Fit a router by least squares: the target is +1 for a token's own adapter and -1 for the others.

    The tokens of each adapter have the same total weight. The result is scaled so that the own adapter's logit leads
    the mean of the other logits by 4, averaged over adapters.

    Args:
        seconds: float64 `(in, in)`, the sum over adapters of the mean of `x x^T`; overwritten.
        means: float64 `(adapters, in)`, the mean of `x` on each adapter's data.

    Returns:
        `(adapters, in)`.
    """
    count = len(means)
    targets = 2 * torch.eye(count, dtype=means.dtype, device=means.device) - 1
    weights = solve_full(ridge_cholesky(seconds)[0], targets @ means)
    logits = means @ weights.t()
    own = logits.diagonal()
    lead = (own - (logits.sum(1) - own) / max(count - 1, 1)).mean()
    return weights * (_MARGIN / lead) if lead > 0 else weights


def fit_routers(model: Any, modules: Mapping[str, Any], data: Sequence[Calibration], memory_gb: float) -> Routers:
    """Fit the router of every module to the data of the adapters.

    Inputs are read twice: with the data's own adapter active and, since lower layers may choose a different expert,
    without an adapter.

    Args:
        model: the model with the adapters "0", "1" ...
        modules: name -> linear.
        data: the data of each adapter.
        memory_gb: memory for moments, in GB.
    """
    rows = [token_ids(each.fitted) for each in data]
    groups = group_by_input(model, modules, rows[0][0][:1])
    sizes = [moment_bytes(linear_sizes(modules[names[0]])[0], [1] * len(names)) for names in groups]
    weights: dict[str, torch.Tensor] = {}
    # Half of the memory: the sum over adapters and the moments of one adapter exist at the same time.
    for part in split_by_memory(sizes, memory_gb * 1e9 / 2):
        names = [groups[index] for index in part]
        seconds: list[torch.Tensor | None] = [None] * len(names)
        means: list[list[torch.Tensor]] = [[] for _ in names]
        for number, own in enumerate(rows):
            model.set_adapter(str(number))
            for context in (nullcontext, model.disable_adapter):
                with context():
                    for index, (second, mean) in _input_means(model, modules, names, own).items():
                        means[index].append(mean)
                        before = seconds[index]
                        seconds[index] = second if before is None else before.add_(second)
        for same_input, total, each in zip(names, seconds, means, strict=True):
            if total is not None and len(each) == 2 * len(rows):
                mean = torch.stack(each).view(len(rows), 2, -1).mean(1)
                weights |= dict.fromkeys(same_input, solve_router(total.div_(2), mean).cpu())
    return Routers(weights, _first_choice_shares(model, modules, data, weights))


def _input_means(
    model: Any, modules: Mapping[str, Any], groups: Sequence[Sequence[str]], rows: Sequence[torch.Tensor]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Index of a group of modules -> the means of `x x^T` and of `x`; groups that no token reached are left out."""
    tokens = sum(each.numel() for each in rows)
    moments = gather_moments(model, modules, groups, lambda name, x: x.new_ones(len(x), 1), rows)
    return {
        index: (found.second / tokens, found.cross[groups[index][0]][0] / tokens)
        for index, found in enumerate(moments)
        if found is not None
    }


def _first_choice_shares(
    model: Any, modules: Mapping[str, Any], data: Sequence[Calibration], weights: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Name of a module -> share of held-out tokens whose own adapter has the largest logit, mean over adapters."""
    hits = {name: torch.zeros(len(data), 2, dtype=torch.float64) for name in weights}
    adapter = 0

    def count(name: str, x: torch.Tensor, number: int) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        chosen = (x @ weights[name].to(x).t()).argmax(1)
        hits[name][adapter] += torch.tensor([(chosen == adapter).sum().item(), len(x)], dtype=torch.float64)

    for adapter, each in enumerate(data):
        model.set_adapter(str(adapter))
        watch_inputs(model, {name: modules[name] for name in weights}, token_ids(each.held_out), count)
    return {name: (counts[:, 0] / counts[:, 1].clamp(min=1)).mean().item() for name, counts in hits.items()}

"""Routers in closed form: least squares to tell apart the inputs that each adapter has on its own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from mola.architecture.linears import linear_sizes
from mola.exporting.calibration import Calibration, token_ids
from mola.exporting.low_rank import solve, square_root
from mola.exporting.moments import (
    Features,
    every_logit,
    gather_all,
    inputs_seen,
    moment_bytes,
    run,
    with_same_input,
    within,
)

_MARGIN = 4.0  # mean lead of the right expert's logit: its gate among two is 0.98 then


class Routers(NamedTuple):
    """Fitted routers.

    Attributes:
        weights: by module, float64 `(adapters, in)`; a module that saw no token is left out.
        right: by module, share of held-out tokens whose largest logit is that of their own adapter, mean over adapters.
    """

    weights: dict[str, torch.Tensor]
    right: dict[str, float]


def router_of(seconds: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    r"""Least squares to +1 for the own adapter and -1 for others, each adapter's tokens with the same weight in all.

    Scaled so that the right logit leads the mean of the others by 4 in the mean over adapters.

    Args:
        seconds: float64 `(in, in)`, the sum over adapters of the mean of `x x^T`; overwritten.
        means: float64 `(adapters, in)`, the mean of `x` on each adapter's data.

    Returns:
        `(adapters, in)`.
    """
    count = len(means)
    targets = 2 * torch.eye(count, dtype=means.dtype, device=means.device) - 1
    weights = solve(square_root(seconds)[0], targets @ means)
    logits = means @ weights.t()
    own = logits.diagonal()
    lead = (own - (logits.sum(1) - own) / max(count - 1, 1)).mean()
    return weights * (_MARGIN / lead) if lead > 0 else weights


def fit_routers(model: Any, modules: Mapping[str, Any], data: Sequence[Calibration], memory_gb: float) -> Routers:
    """Fit the router of every module to the adapters' own data.

    Args:
        model: with the adapters "0", "1" ...
        modules: the linears by name.
        data: of each adapter.
        memory_gb: most memory for moments.
    """
    rows = [token_ids(each.fitted) for each in data]
    groups = with_same_input(model, modules, rows[0][0][:1])
    sizes = [moment_bytes(linear_sizes(modules[names[0]])[0], [1] * len(names)) for names in groups]
    weights: dict[str, torch.Tensor] = {}
    # Twice as much: a sum over adapters, and one adapter's.
    for part in within(sizes, memory_gb * 1e9 / 2):
        names = [groups[index] for index in part]
        sums: list[torch.Tensor | None] = [None] * len(names)
        means: list[list[torch.Tensor]] = [[] for _ in names]
        for number, own in enumerate(rows):
            for state in _states(number):
                for index, (second, mean) in enumerate(_means(model, state, modules, names, own)):
                    means[index] += [] if mean is None else [mean]
                    sums[index] = second if (before := sums[index]) is None or second is None else before.add_(second)
        for same, total, each in zip(names, sums, means, strict=True):
            states = len(_states(0))
            if total is not None and len(each) == len(rows) * states:
                mean = torch.stack(each).view(len(rows), states, -1).mean(1)
                weights |= dict.fromkeys(same, router_of(total.div_(states), mean).cpu())
    return Routers(weights, _right(model, modules, data, weights))


def _states(number: int) -> tuple[str | None, ...]:
    """Adapters that are active on the data of one: its own and, as lower layers may choose others, none."""
    return str(number), None


def _active(model: Any, state: str | None) -> Any:
    if state is None:
        return model.disable_adapter()
    model.set_adapter(state)
    return nullcontext()


def _means(
    model: Any,
    state: str | None,
    modules: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    rows: Sequence[torch.Tensor],
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Mean of `x x^T` and of `x` of each input; None where no token came by."""
    one: Features = lambda name, x: x.new_ones(len(x), 1)  # noqa: E731
    tokens = sum(each.numel() for each in rows)
    with _active(model, state):
        found = zip(gather_all(model, modules, groups, one, rows), groups, strict=True)
    return [(None, None) if m is None else (m.second / tokens, m.cross[names[0]][0] / tokens) for m, names in found]


@torch.no_grad()
def _right(
    model: Any, modules: Mapping[str, Any], data: Sequence[Calibration], weights: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    hits = {name: torch.zeros(len(data), 2, dtype=torch.float64) for name in weights}
    number = 0

    def see(name: str, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        chosen = (x @ weights[name].to(x).t()).argmax(1)
        hits[name][number] += torch.tensor([(chosen == number).sum().item(), len(x)], dtype=torch.float64)

    with inputs_seen({name: modules[name] for name in weights}, see):
        for number, each in enumerate(data):
            model.set_adapter(str(number))
            for ids in token_ids(each.held_out):
                run(model, ids, **every_logit(model, modules.values()))
    return {name: (counts[:, 0] / counts[:, 1].clamp(min=1)).mean().item() for name, counts in hits.items()}

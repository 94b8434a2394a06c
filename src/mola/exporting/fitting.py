"""The update of one LoRA for the experts of every linear: their mean, or the nearest one on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mola.exporting.calibration import Row, answer_weights, token_ids
from mola.exporting.low_rank import cut, regression, square_root
from mola.exporting.mixtures import Mixture, Update, as_lora, as_parameters, gated
from mola.exporting.moments import gather_all, moment_bytes, with_same_input, within
from mola.tuner.layer import MolaLinear

_RIDGE = 1e-4  # less leaves more to the data; of 1e-2 to 1e-5 chosen on held-out rows


def mean_of_experts(mixture: Mixture, rank: int, gates: torch.Tensor | None = None) -> Update:
    """The mean of the experts, weighted by `gates (E,)`, cut to a rank; one expert as it is."""
    num_experts = len(mixture.A)
    if num_experts == 1:
        return mixture.B[0].t(), mixture.A[0]
    weights = torch.full((num_experts,), 1 / num_experts) if gates is None else gates / gates.sum()
    return cut(mixture.left(weights), mixture.right(), rank)


def nearest_on_data(
    model: Any,
    layers: Mapping[str, MolaLinear],
    experts: Mapping[str, Mixture],
    rows: Sequence[Row],
    rank: int,
    memory_gb: float,
    passes: int,
    answer_weight: float,
) -> tuple[dict[str, Update], list[str]]:
    """Reduced-rank regressions of all modules on rows.

    Layers are fitted part by part, in the order in which the model computes them, each part to the inputs that it has
    after those before it have been converted.

    Args:
        model: with the mixture.
        layers: of the model.
        experts: of the layers.
        rows: to fit to.
        rank: of modules with several experts.
        memory_gb: most memory for moments: of how many parts there are at least.
        passes: as many parts at least, as far as there are layers.
        answer_weight: how often tokens count at which an answer, or a text, is predicted.

    Returns:
        The updates, and the names of modules that saw no token: these have the experts' mean.
    """
    tokens, weights = token_ids(rows), answer_weights(rows, answer_weight)
    several = {name: layer for name, layer in layers.items() if len(experts[name].A) > 1}
    updates = {name: mean_of_experts(experts[name], rank) for name in layers if name not in several}
    groups = with_same_input(model, several, tokens[0][:1])
    sizes = [
        moment_bytes(experts[names[0]].A.shape[2], (experts[name].A[..., 0].numel() for name in names))
        for names in groups
    ]
    unseen = []
    for part in within(sizes, memory_gb * 1e9, passes):
        names = [groups[index] for index in part]
        converted = as_parameters(layers, {name: update for name, update in updates.items() if name in several})
        with as_lora(layers, converted):
            features = lambda name, x: gated(layers[name], experts[name].A, x)  # noqa: E731
            found = gather_all(model, layers, names, features, tokens, weights)
        for index, moments in enumerate(found):
            found[index] = None  # freed one after the other
            if moments is None:
                unseen += names[index]
                updates |= {name: mean_of_experts(experts[name], rank) for name in names[index]}
                continue
            root, ridge = square_root(moments.second, _RIDGE)
            for name in names[index]:
                # What the data do not say is left to the mean of the experts, not to zero.
                mean = experts[name].right().to(root.device) / len(experts[name].A)
                left = experts[name].left().to(root.device)
                B, A = regression(root, moments.cross[name] + mean * ridge, left, rank)
                updates[name] = B.cpu(), A.cpu()
    return {name: updates[name] for name in layers}, unseen

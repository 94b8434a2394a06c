"""A trained adapter on data: which experts work on which tokens, and how different they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from mola.data.encode import IGNORED
from mola.insight.recording import gates_of_tokens
from mola.insight.redundancy import expert_distances, mean_pairwise, subspace_overlaps
from mola.insight.usage import ModuleUsage, UsageCounter
from mola.tuner.layer import MolaLinear


@dataclass(frozen=True)
class ModuleRedundancy:
    """How alike the experts of one module are; means over pairs of experts.

    Attributes:
        module: its name in the model.
        layer_index: its decoder layer, None outside the layers.
        distance: Frobenius distance of the updates, see `mola.insight.redundancy.expert_distances`.
        input_overlap: overlap of what experts read, from 0 to 1; NaN where a matrix is zero.
        output_overlap: overlap of what experts write.
    """

    module: str
    layer_index: int | None
    distance: float
    input_overlap: float
    output_overlap: float


def redundancy_of(model: torch.nn.Module) -> list[ModuleRedundancy]:
    """Redundancy of every module of the active adapters that has several experts."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MolaLinear):
            for adapter in module.active_adapters:
                if module.num_experts.get(adapter, 1) > 1:
                    experts_A, experts_B = module.mola_A[adapter], module.mola_B[adapter]
                    distances = expert_distances(experts_A, experts_B, module.scaling[adapter])
                    overlaps = (mean_pairwise(subspace_overlaps(stack)) for stack in (experts_A, experts_B))
                    found.append(ModuleRedundancy(name, module.layer_index, mean_pairwise(distances), *overlaps))
    return found


def usage_on(
    model: Any, dataset: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, str]], show_progress: bool = False
) -> dict[str, list[ModuleUsage]]:
    """Use of experts over samples, which are read one at a time: there is no padding to leave out.

    Args:
        model: with an adapter, in eval mode.
        dataset: `input_ids` and `labels` of each sample, see `mola.data.encode.encode_examples`.
        groups: column -> value of each sample, such as `{"subject": "physics"}`.
        show_progress: show a bar on standard error.

    Returns:
        The use over `all` tokens, over those of the `prompt` and of the `answer`, and over all tokens of every group,
        named `column=value`.

    Raises:
        MolaError: no module has a router.
    """
    counters: dict[str, UsageCounter] = {name: UsageCounter() for name in ("all", "prompt", "answer")}
    samples = zip(dataset, groups, strict=True)
    bar = {"total": len(groups), "console": Console(stderr=True), "disable": not show_progress}
    for sample, group in track(samples, "Looking at the experts", **bar):  # type: ignore[arg-type]
        recorded = gates_of_tokens(model, list(sample["input_ids"]))
        is_answer = torch.tensor([label != IGNORED for label in sample["labels"]])
        counters["all"].add(recorded)
        counters["prompt"].add(recorded, ~is_answer)
        counters["answer"].add(recorded, is_answer)
        for column, value in group.items():
            counters.setdefault(f"{column}={value}", UsageCounter()).add(recorded)
    return {name: counter.usage() for name, counter in counters.items()}


def to_records(rows: Sequence[ModuleUsage] | Sequence[ModuleRedundancy]) -> list[dict[str, Any]]:
    """Plain values for JSON, NaN as None."""
    return [{key: None if value != value else value for key, value in asdict(row).items()} for row in rows]

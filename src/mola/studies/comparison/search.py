"""The search for options: which values were best for each recipe and task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from mola.reporting.formatting import NO_VALUE, nats, points
from mola.studies.comparison.options import MARK, CompareOptions
from mola.studies.comparison.record import Result

_NOTE = (
    "Search: mean {outcome} over the tuning seeds, on {questions} that are not in the test. At the edge: the "
    "best value is the lowest or highest one tried, and a value beyond it may be better."
)


@dataclass(frozen=True)
class Found:
    """The search result for one recipe on one task."""

    task: str
    recipe: str
    accuracies: dict[str, float]  # candidate -> mean accuracy over the tuning seeds; empty for free text
    chosen: str  # the best candidate; the first one of equal candidates
    edges: list[str] = field(default_factory=list)  # options whose best value is the lowest or highest one tried
    diverged: dict[str, list[int]] = field(default_factory=dict)  # candidate -> seeds whose training diverged
    # Of free text: candidate -> mean loss over the tuning seeds; None if a training diverged.
    losses: dict[str, float | None] = field(default_factory=dict)


def search_results(options: CompareOptions, results: Sequence[Result]) -> list[Found]:
    """Choose a candidate for every task and recipe. All runs of the search must be in `results`."""
    by_key = {result.key: result for result in results}
    found = []
    for task, recipe in dict.fromkeys((key.task, key.recipe) for key in options.runs):
        accuracies, losses, diverged, costs = {}, {}, {}, {}
        for candidate in options.candidates:
            keys = [key for key in options.tuning_runs if (key.task, key.recipe) == (task, recipe + candidate)]
            runs = [by_key[key] for key in keys]
            if runs[0].is_scored:
                accuracies[candidate] = fmean(each.accuracy or 0.0 for each in runs)
                costs[candidate] = -accuracies[candidate]
            else:
                known = [each.loss for each in runs if each.loss is not None]
                losses[candidate] = fmean(known) if len(known) == len(runs) else None
                costs[candidate] = math.inf if losses[candidate] is None else fmean(known)
            if seeds := [each.seed for each in runs if each.diverged_at is not None]:
                diverged[candidate] = seeds
        chosen = min(costs, key=lambda candidate: round(costs[candidate], 9))  # equal means may differ by rounding
        found.append(Found(task, recipe, accuracies, chosen, _edges(options.candidates, chosen), diverged, losses))
    return found


def _edges(candidates: Mapping[str, Mapping[str, Any]], chosen: str) -> list[str]:
    """Options whose chosen value is the lowest or highest one tried, so that a better value may lie beyond."""
    found = []
    for name, best in candidates[chosen].items():
        values = {candidate[name] for candidate in candidates.values()}
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if is_number and len(values) > 1 and best in (min(values), max(values)):
            found.append(name)
    return found


def search_table(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the accuracy or the loss of every candidate, and which one is chosen."""
    candidates = list(found[0].accuracies or found[0].losses)
    lines = []
    for each in found:
        cells = [_mean_text(each, name) + (" (diverged)" if name in each.diverged else "") for name in candidates]
        edges = f" (at the edge: {', '.join(each.edges)})" if each.edges else ""
        lines.append([each.task, each.recipe, *cells, each.chosen.lstrip(MARK) + edges])
    return ["task", "recipe", *(name.lstrip(MARK) for name in candidates), "chosen"], lines


def _mean_text(found: Found, candidate: str) -> str:
    if found.accuracies:
        return points(found.accuracies[candidate], "")
    loss = found.losses[candidate]
    return NO_VALUE if loss is None else nats(loss, "")


def search_notes(found: Sequence[Found]) -> list[str]:
    """What the numbers of `search_table` are."""
    notes = []
    if any(each.accuracies for each in found):
        notes.append(_NOTE.format(outcome="accuracy in per cent", questions="questions"))
    if any(each.losses for each in found):
        notes.append(_NOTE.format(outcome="loss in nats per token", questions="rows"))
    return notes

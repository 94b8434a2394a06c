"""The search for options: which candidate is chosen for each recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from mola.studies.comparison.options import CompareOptions
from mola.studies.comparison.record import Result


@dataclass(frozen=True)
class Found:
    """The search result for one recipe on one task."""

    task: str
    recipe: str
    accuracies: dict[str, float]  # candidate -> mean accuracy over the tuning seeds
    chosen: str  # the best candidate; the first one of equal candidates
    edges: list[str] = field(default_factory=list)  # options whose best value is the lowest or highest one tried
    diverged: dict[str, list[int]] = field(default_factory=dict)  # candidate -> seeds whose training diverged


def search_results(options: CompareOptions, results: Sequence[Result]) -> list[Found]:
    """Choose a candidate for every task and recipe. All runs of the search must be in `results`."""
    by_key = {result.key: result for result in results}
    found = []
    for task, recipe in dict.fromkeys((key.task, key.recipe) for key in options.runs):
        means, diverged = {}, {}
        for candidate in options.candidates:
            keys = [key for key in options.tuning_runs if (key.task, key.recipe) == (task, recipe + candidate)]
            means[candidate] = fmean(by_key[key].accuracy for key in keys)
            if seeds := [key.seed for key in keys if by_key[key].diverged_at is not None]:
                diverged[candidate] = seeds
        chosen = max(means, key=lambda candidate: round(means[candidate], 9))  # equal means may differ by rounding
        found.append(Found(task, recipe, means, chosen, _edges(options.candidates, chosen), diverged))
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

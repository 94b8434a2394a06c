"""Planned comparisons of recipes with each other, besides those with the reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mola.evaluation.differences import Difference, paired_difference
from mola.studies.comparison.record import Result
from mola.studies.comparison.summary import marks_of_tables


@dataclass(frozen=True)
class Contrast:
    """One recipe minus another on one task, or on all, over the seeds of both."""

    task: str
    measure: str  # as of `summary.Row`
    recipe: str
    other: str
    difference: Difference


def contrasts(results: Sequence[Result], pairs: Sequence[tuple[str, str]], tasks: Sequence[str]) -> list[Contrast]:
    """Differences of all pairs with a common seed, by measure and task.

    Joint intervals, p and verdicts allow for the pairs of one measure and task.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    found = []
    for measure, task, marks, parts in marks_of_tables(results, names, tasks) if pairs else ():
        shared = {pair: sorted(marks[pair[0]].keys() & marks[pair[1]].keys()) for pair in pairs}
        for (recipe, other), seeds in shared.items():
            if seeds:
                ours, theirs = (np.stack([marks[name][seed] for seed in seeds]) for name in (recipe, other))
                difference = paired_difference(ours, theirs, sum(map(bool, shared.values())), parts)
                found.append(Contrast(task, measure, recipe, other, difference))
    return found

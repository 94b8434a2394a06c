"""Planned comparisons of recipes with each other, besides those with the reference."""

from collections.abc import Sequence
from dataclasses import dataclass

from mola.evaluation.differences import Difference
from mola.studies.comparison.record import Result
from mola.studies.comparison.summary import differences_of, marks_of_tables


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
    return [
        Contrast(table.task, table.measure, recipe, other, difference)
        for table in (marks_of_tables(results, names, tasks) if pairs else ())
        for (recipe, other), difference in differences_of(table, pairs).items()
    ]

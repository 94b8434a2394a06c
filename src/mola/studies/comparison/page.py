"""The table of a comparison as one HTML file that needs nothing else, in the style of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from mola.reporting.document import Section, Table, render
from mola.reporting.formatting import percent
from mola.studies.comparison.summary import Row
from mola.studies.comparison.tables import COLUMNS, NOTE, by_budget, cells


def page(rows: Sequence[Row], reference: str) -> str:
    """The whole file.

    Args:
        rows: see `mola.studies.comparison.summary.summarize`.
        reference: recipe that the others are compared with.
    """
    sections = [
        Section(f"task-{number}", task, _task(by_budget(list(members)), reference), "comparison")
        for number, (task, members) in enumerate(groupby(rows, key=lambda row: row.task), start=1)
    ]
    verdicts = [row.difference.verdict for row in rows if row.difference is not None]
    return render(
        "comparison.html",
        "Recipes compared: mola",
        sections,
        significant=sum(verdict != "no significant difference" for verdict in verdicts),
        compared=len(verdicts),
        reference=reference,
        note=NOTE.format(reference=reference),
    )


def _task(rows: Sequence[Row], reference: str) -> dict[str, Any]:
    differences = [cells(row, reference) for row in rows]
    strips = []
    for row in rows:
        low, high = row.mean.interval_95 or (row.mean.value, row.mean.value)
        look = "b" if row.recipe == reference else "a"
        strips.append((row.recipe, percent(row.mean.value), [(look, row.mean.value, (max(low, 0.0), min(high, 1.0)))]))
    return {
        "strips": strips,
        "has_interval": any(row.mean.interval_95 for row in rows),
        "differences": Table(COLUMNS, differences, "Differences and their significance"),
    }

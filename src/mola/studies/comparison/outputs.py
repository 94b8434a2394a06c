"""Files that the table of a comparison is written to."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import atomic_write_text, check_writable
from mola.reporting.document import Section, Table, render
from mola.reporting.formatting import percent
from mola.studies.comparison.summary import Row
from mola.studies.comparison.tables import COLUMNS, NOTE, by_budget, cells, comma_separated, markdown


def check_tables(tables: str | None) -> list[Path]:
    """Paths of the files asked for.

    Raises:
        MolaError: an ending that says no form, or a file that cannot be written.
    """
    paths = [Path(name.strip()) for name in (tables or "").split(",") if name.strip()]
    for path in paths:
        if path.suffix not in _FORMS:
            raise MolaError(f"`tables` must be files that end in {', '.join(_FORMS)}: got {str(path)!r}.")
        check_writable(path)
    return paths


def write_tables(tables: str | None, rows: Sequence[Row], reference: str) -> None:
    """Write the table in every form asked for; earlier ones are replaced."""
    for path in check_tables(tables):
        atomic_write_text(path, _FORMS[path.suffix](rows, reference))


def page(rows: Sequence[Row], reference: str) -> str:
    """The table as one HTML file that needs nothing else, in the style of a run's report."""
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


_FORMS: dict[str, Callable[[Sequence[Row], str], str]] = {
    ".csv": lambda rows, reference: comma_separated(rows),
    ".md": markdown,
    ".html": page,
}

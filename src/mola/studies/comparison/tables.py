"""The rows of a comparison as a table: in the terminal, as CSV and as Markdown."""

import csv
import io
from collections.abc import Sequence
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from mola.reporting.formatting import markdown_table
from mola.studies.comparison.summary import Row

COLUMNS = (
    "recipe",
    "trained values",
    "seeds",
    "accuracy",
    "its 95 % over seeds",
    "difference",
    "its 95 % over seeds",
    "its 95 % over questions",
    "p",
    "verdict",
)
_CSV_COLUMNS = (
    "task",
    "recipe",
    "trainable_parameters",
    "budget_group",
    "seeds",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "difference",
    "difference_seeds_low",
    "difference_seeds_high",
    "difference_questions_low",
    "difference_questions_high",
    "p_questions",
    "p_adjusted",
    "verdict",
    "num_experts",
)
NOTE = (
    "Accuracy in per cent, differences to {reference} in points, on the same questions with the same seeds. p: over "
    "questions, adjusted for the number of recipes. A verdict needs both intervals on one side of 0 and p < 0.05. "
    "Groups: trained values within 5 %."
)


def terminal_tables(rows: Sequence[Row], reference: str) -> list[Table]:
    """One table per task, with a line between groups of equal budget."""
    tables = []
    for task, members in groupby(rows, key=lambda row: row.task):
        table = Table(title=escape(task), caption=NOTE.format(reference=escape(reference)))
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number in (0, len(COLUMNS) - 1) else "right", overflow="fold")
        for _, group in groupby(by_budget(list(members)), key=lambda row: row.budget_group):
            for row in group:
                table.add_row(*map(escape, cells(row, reference)))
            table.add_section()
        tables.append(table)
    return tables


def by_budget(rows: Sequence[Row]) -> list[Row]:
    """The base model first, then groups of equal budget, smallest first; within a group as given."""
    return sorted(rows, key=lambda row: -1 if row.budget_group is None else row.budget_group)


def cells(row: Row, reference: str) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    parameters = f"{row.trainable_parameters:,}" if row.trainable_parameters else "-"
    seeds = str(row.mean.seeds) if row.budget_group is not None else "-"
    start = [row.recipe, parameters, seeds, f"{100 * row.mean.value:.1f}", _interval(row.mean.interval_95, "")]
    other = row.difference
    if other is None:
        return [*start, *[""] * 4, "reference" if row.recipe == reference else ""]
    intervals = [_interval(other.seeds_95), _interval(other.questions_95)]
    return [*start, f"{100 * other.value:+.1f}", *intervals, _p(other.p_adjusted), other.verdict]


def markdown(rows: Sequence[Row], reference: str) -> str:
    """A table per task under a heading."""
    parts = []
    for task, members in groupby(rows, key=lambda row: row.task):
        rows_of_task = [cells(row, reference) for row in by_budget(list(members))]
        parts += [f"### {task}", markdown_table(COLUMNS, rows_of_task)]
    return "\n\n".join([*parts, NOTE.format(reference=f"`{reference}`")]) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """All numbers unrounded, one line per task and recipe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in rows:
        low, high = row.mean.interval_95 or ("", "")
        line = [row.task, row.recipe, row.trainable_parameters, row.budget_group, row.mean.seeds]
        line += [row.mean.value, low, high]
        other = row.difference
        if other is None:
            line += [""] * 8
        else:
            line += [other.value, *(other.seeds_95 or ("", "")), *other.questions_95]
            line += [other.p_questions, other.p_adjusted, other.verdict]
        writer.writerow([*line, " ".join("-".join(map(str, each)) for each in row.num_experts)])
    return text.getvalue()


def _interval(interval: tuple[float, float] | None, sign: str = "+") -> str:
    return "" if interval is None else f"{100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"

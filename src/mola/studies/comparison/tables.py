"""The rows of a comparison as a table: in the terminal, as CSV and as Markdown."""

import csv
import io
from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from mola.evaluation.differences import Difference
from mola.reporting.formatting import markdown_table, points
from mola.studies.comparison.contrasts import Contrast
from mola.studies.comparison.notes import CONTRAST_NOTE, note_of, power_line, search_note
from mola.studies.comparison.options import MARK
from mola.studies.comparison.summary import AT_END, Row
from mola.studies.comparison.tuning import Found, Power

COLUMNS = (
    "recipe",
    "trained values",
    "seeds",
    "accuracy",
    "its 95 % over seeds",
    "difference",
    "its 95 %",
    "joint 95 %",
    "p",
    "verdict",
)
_CSV_COLUMNS = (
    "task",
    "measure",
    "recipe",
    "trainable_parameters",
    "budget_group",
    "seeds",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "difference",
    "difference_low",
    "difference_high",
    "difference_joint_low",
    "difference_joint_high",
    "p_adjusted",
    "verdict",
    "num_experts",
    "steps_to_target",
    "difference_seeds",
    "diverged_seeds",
)
CONTRAST_COLUMNS = ("recipe", "less", "seeds", "difference", "its 95 %", "joint 95 %", "p", "verdict")


def title_of(row: Row | Contrast) -> str:
    """Heading of the table that a row stands in."""
    return row.task if row.measure == AT_END else f"{row.task}, {row.measure}"


def terminal_tables(rows: Sequence[Row], reference: str, contrasts: Sequence[Contrast] = ()) -> list[Table]:
    """One table per task, with a line between groups of equal budget; then those of `contrasts`."""
    tables, note = [], note_of(rows, reference)
    for title, members in groupby(rows, key=title_of):
        table = Table(title=escape(title), caption=escape(note))
        ordered = by_budget(list(members))
        _add_columns(table, columns_of(ordered))
        for _, group in groupby(ordered, key=lambda row: row.budget_group):
            for row in group:
                table.add_row(*map(escape, cells(row, reference) + steps_cell(row)))
            table.add_section()
        tables.append(table)
    for title, lines in contrast_tables(contrasts):
        table = Table(title=escape(title), caption=CONTRAST_NOTE)
        _add_columns(table, CONTRAST_COLUMNS)
        tables.append(_filled(table, lines))
    return tables


def _add_columns(table: Table, names: Sequence[str]) -> None:
    for name in names:
        side: Any = "left" if name in ("recipe", "less", "verdict") else "right"
        table.add_column(name, justify=side, overflow="fold", no_wrap=name in ("accuracy", "difference", "p"))


def _filled(table: Table, lines: Sequence[Sequence[str]]) -> Table:
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def by_budget(rows: Sequence[Row]) -> list[Row]:
    """The base model first, then groups of equal budget, smallest first; within a group as given."""
    return sorted(rows, key=lambda row: -1 if row.budget_group is None else row.budget_group)


def cells(row: Row, reference: str) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    parameters = f"{row.trainable_parameters:,}" if row.trainable_parameters else "-"
    seeds = str(row.mean.seeds) if row.budget_group is not None else "-"
    if row.difference is not None and row.difference.seeds != row.mean.seeds:  # while runs are left
        seeds += f", {row.difference.seeds} paired"
    start = [row.recipe, parameters, seeds, points(row.mean.value, ""), interval_cell(row.mean.interval_95, "")]
    other = row.difference
    if other is None:
        return [*start, *[""] * 4, "reference" if row.recipe == reference else ""]
    return [*start, *_difference_cells(other)]


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Headings of one table."""
    return (*COLUMNS, "steps to target") if any(row.steps_to_target is not None for row in rows) else COLUMNS


def steps_cell(row: Row) -> list[str]:
    """Median number of steps to the accuracy asked for, and how many seeds have reached it; no cell if none was."""
    if row.steps_to_target is None:
        return []
    reached = sorted(step for step in row.steps_to_target if step is not None)
    seeds = len(row.steps_to_target)
    # A seed that does not reach it is later than all that do.
    is_known = len(reached) > seeds / 2
    middle = f"{median([*reached, *[float('inf')] * (seeds - len(reached))]):.0f}" if is_known else "later"
    return [f"{middle} ({len(reached)} of {seeds})"]


def contrast_tables(found: Sequence[Contrast]) -> list[tuple[str, list[list[str]]]]:
    """Title and lines of every table of recipes that are compared with each other."""
    return [
        (f"{title}: recipes with each other", [contrast_cells(each) for each in members])
        for title, members in groupby(found, key=title_of)
    ]


def contrast_cells(contrast: Contrast) -> list[str]:
    """A contrast as text, in the order of `CONTRAST_COLUMNS`."""
    found = contrast.difference
    return [contrast.recipe, contrast.other, str(found.seeds), *_difference_cells(found)]


def _difference_cells(found: Difference) -> list[str]:
    intervals = interval_cell(found.both_95), interval_cell(found.joint_95)
    return [points(found.value), *intervals, p_cell(found.p_adjusted), found.verdict]


def search_tables(found: Sequence[Found]) -> list[Table]:
    """What was tried, and chosen, for each recipe: one table per task."""
    tables = []
    for part in search_parts(found):
        table = Table(title=escape(part.title), caption=escape(search_note(part.tried)))
        for column in part.head:
            table.add_column(column, overflow="fold")
        tables.append(_filled(table, part.lines))
    return tables


class SearchPart(NamedTuple):
    """What was tried for one task, as a table."""

    title: str
    head: list[str]
    lines: list[list[str]]
    tried: list[Found]


def search_parts(found: Sequence[Found]) -> list[SearchPart]:
    """A table for every task of a search."""
    parts = []
    for task, members in groupby(found, key=lambda each: each.task):
        tried = list(members)
        marks = list(tried[0].accuracies)
        head = ["recipe", *(mark.lstrip(MARK) for mark in marks), "chosen"]
        parts.append(SearchPart(f"{task}: search", head, [_search_line(each, marks) for each in tried], tried))
    return parts


def _search_line(found: Found, marks: Sequence[str]) -> list[str]:
    edges = f" (at the edge: {', '.join(found.edges)})" if found.edges else ""
    return [found.recipe, *(points(found.accuracies[mark], "") for mark in marks), found.chosen.lstrip(MARK) + edges]


def markdown(rows: Sequence[Row], reference: str, contrasts: Sequence[Contrast] = ()) -> str:
    """A table per task under a heading, then those of `contrasts`."""
    parts: list[str] = []
    for title, members in groupby(rows, key=title_of):
        ordered = by_budget(list(members))
        lines = [cells(row, reference) + steps_cell(row) for row in ordered]
        parts += [f"### {title}", markdown_table(columns_of(ordered), lines)]
    parts.append(note_of(rows, reference, "`"))
    for title, lines in contrast_tables(contrasts):
        parts += [f"### {title}", markdown_table(CONTRAST_COLUMNS, lines)]
    return "\n\n".join([*parts, *([CONTRAST_NOTE] if contrasts else [])]) + "\n"


def search_markdown(found: Sequence[Found], powers: Sequence[Power]) -> str:
    """The search and what it says about the number of seeds; empty without one."""
    parts = []
    for part in search_parts(found):
        parts += [f"### {part.title}", markdown_table(part.head, part.lines)]
    if parts:
        parts += [search_note(found, "`"), *map(power_line, powers)]
    return "".join(f"{part}\n\n" for part in parts)


def comma_separated(rows: Sequence[Row], contrasts: Sequence[Contrast] = ()) -> str:
    """All numbers unrounded, one line per task and recipe, then one per contrast, as recipe `A - B`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in rows:
        low, high = row.mean.interval_95 or ("", "")
        line = [row.task, row.measure, row.recipe, row.trainable_parameters, row.budget_group, row.mean.seeds]
        line += [row.mean.value, low, high]
        line += [""] * 7 if row.difference is None else _numbers(row.difference)
        experts = " ".join("-".join(map(str, each)) for each in row.num_experts)
        steps = " ".join("never" if each is None else f"{each:g}" for each in row.steps_to_target or ())
        seeds = "" if row.difference is None else row.difference.seeds
        writer.writerow([*line, experts, steps, seeds, " ".join(map(str, row.diverged))])
    for each in contrasts:
        name, seeds = f"{each.recipe} - {each.other}", each.difference.seeds
        line = [each.task, each.measure, name, "", "", seeds, "", "", "", *_numbers(each.difference), "", "", seeds, ""]
        writer.writerow(line)
    return text.getvalue()


def _numbers(found: Difference) -> list[float | str]:
    ends = [*(found.both_95 or ("", "")), *(found.joint_95 or ("", ""))]
    return [found.value, *ends, "" if found.p_adjusted is None else found.p_adjusted, found.verdict]


def interval_cell(interval: tuple[float, float] | None, sign: str = "+") -> str:
    """Ends of an interval in points or per cent; empty where there is none."""
    return "" if interval is None else " to ".join(points(end, sign) for end in interval)


def p_cell(value: float | None) -> str:
    """A p-value with three digits; empty where there is none."""
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"

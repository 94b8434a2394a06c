"""The table that `mola continual` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from mola.studies.continual_learning.continual import ContinualResult


def result_table(result: ContinualResult) -> Table:
    """Accuracy of every task after every stage, with OP and PD."""
    table = Table(title=escape(f"{result.output_dir}: accuracy after every stage"))
    table.add_column("after stage", overflow="fold")
    for name in (*result.stages, "OP", "PD"):
        table.add_column(escape(name), justify="right", overflow="fold")
    if result.base is not None:
        table.add_row("start", *_cells(result.base, result.stages), "", "")
    for row in result.results:
        drop = row["performance_drop"]
        table.add_row(
            escape(f"{row['stage']} {row['name']}"),
            *_cells(row["tasks"], result.stages),
            f"{row['overall_performance']:.1%}",
            "" if drop is None else f"{100 * drop:+.1f}",
        )
    table.caption = "OP: mean of the row. PD: mean change since a task's own stage, in points; negative = forgotten."
    return table


def _cells(tasks: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    return [f"{tasks[name]['accuracy']:.1%}" if name in tasks else "" for name in names]

"""What a sequence ended with, and the table of it that `mola continual` prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table


@dataclass
class ContinualResult:
    """What a sequence of stages ended with.

    Attributes:
        output_dir: folder of the sequence; `output_dir/NN-NAME` are the stages' run folders.
        status: "finished", or "interrupted" by a signal.
        stages: names of the stages in the order of training.
        base: with `evaluate_base`, task -> accuracy, correct, total, unanswered, interval_95 before the first
            stage; else None. No part of OP and PD.
        results: per finished and tested stage `stage` (1, 2, ...), `name`, `tasks` (the row of R: task -> as in
            `base`), `overall_performance` (OP) and `performance_drop` (PD; None after the first stage).
        seconds: wall time of this call, checks left out.
    """

    output_dir: str
    status: str
    stages: list[str]
    base: dict[str, dict[str, Any]] | None
    results: list[dict[str, Any]]
    seconds: float


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
            "" if drop is None else f"{round(100 * drop, 1) + 0.0:+.1f}",  # no -0.0
        )
    table.caption = "OP: mean of the row. PD: mean change since a task's own stage, in points; negative = forgotten."
    return table


def _cells(tasks: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    return [f"{tasks[name]['accuracy']:.1%}" if name in tasks else "" for name in names]

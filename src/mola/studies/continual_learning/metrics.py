"""The result of a sequence of stages: accuracies, the metrics OP and PD, the table that `mola continual` prints.

R[t][i] is the accuracy on task i after training stage t, for i <= t; both count from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table


def overall_performance(matrix: Sequence[Sequence[float]]) -> float:
    """Mean accuracy on the tasks seen so far, after the last stage of `matrix`.

        OP_t = (1 / t) * sum over i <= t of R[t][i]

    Args:
        matrix: R up to stage t: one row per stage, the first with one accuracy, the second with two, ...

    Returns:
        OP_t, a fraction of 1.

    Source: the average accuracy of Chaudhry et al. 2018.
    """
    return sum(matrix[-1]) / len(matrix)


def performance_drop(matrix: Sequence[Sequence[float]]) -> float | None:
    """Mean change on the earlier tasks since each was trained, after the last stage of `matrix`.

        PD_t = (1 / (t - 1)) * sum over i < t of (R[t][i] - R[i][i])

    A negative value means forgetting; a positive one means that later tasks helped.

    Args:
        matrix: R up to stage t, see `overall_performance`.

    Returns:
        PD_t, between -1 and 1; None for t = 1, since there is no earlier task.

    Source: after the forgetting measure of Chaudhry et al. 2018, which compares with the best accuracy of any
    earlier stage instead of the accuracy right after the task's own stage.
    """
    earlier = len(matrix) - 1
    if earlier == 0:
        return None
    return sum(matrix[-1][i] - matrix[i][i] for i in range(earlier)) / earlier


@dataclass
class ContinualResult:
    """Result of a sequence of stages.

    Attributes:
        output_dir: folder of the sequence; `output_dir/NN-NAME` are the stages' run folders.
        status: "finished", or "interrupted" by a signal.
        stages: names of the stages in the order of training.
        base: with `evaluate_base`, task -> accuracy, correct, total, unanswered, interval_95 before the first
            stage; else None. OP and PD do not use it.
        results: for each finished and tested stage: `stage` (1, 2, ...), `name`, `tasks` (the row of R, in the format
            of `base`), `overall_performance` (OP) and `performance_drop` (PD; None after the first stage). With
            `growth` skills also `asked` (task -> name of a skill, or "base" -> number of questions) and `changed`
            (see `mola.studies.continual_learning.skills.changed`).
        seconds: wall time of this call, without its checks.
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
    grows_skills = any("asked" in row for row in result.results)
    if grows_skills:
        table.add_column("asked right", justify="right")
        table.add_column("changed", justify="right")
    if result.base is not None:
        table.add_row("start", *_cells(result.base, result.stages))
    for row in result.results:
        drop = row["performance_drop"]
        table.add_row(
            escape(f"{row['stage']} {row['name']}"),
            *_cells(row["tasks"], result.stages),
            f"{row['overall_performance']:.1%}",
            "" if drop is None else f"{round(100 * drop, 1) + 0.0:+.1f}",  # no -0.0
            *(_skills_cells(row) if grows_skills else ()),
        )
    table.caption = "OP: mean of the row. PD: mean change since a task's own stage, in points; negative = forgotten."
    if grows_skills:
        table.caption += " Changed: old questions that ask another skill, or have another answer, than a stage before."
    return table


def _cells(tasks: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    return [f"{tasks[name]['accuracy']:.1%}" if name in tasks else "" for name in names]


def _skills_cells(row: dict[str, Any]) -> tuple[str, str]:
    """The share of the questions that ask the skill of their task, and the number of old answers that changed."""
    right = sum(counts.get(task, 0) for task, counts in row["asked"].items())
    total = sum(sum(counts.values()) for counts in row["asked"].values())
    return f"{right / total:.1%}", str(len(row["changed"]))

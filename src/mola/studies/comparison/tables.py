"""The table of a comparison: its rows, and their text for the terminal, Markdown and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from rich.markup import escape
from rich.table import Table

from mola.evaluation.differences import Difference, paired_difference
from mola.reporting.formatting import computers, duration, markdown_table, points
from mola.studies.comparison.options import MARK
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.search import Found

ALL_TASKS = "mean of the tasks"
HEADER = ("task", "recipe", "trainable parameters", "seeds", "accuracy", "difference", "95 %", "verdict")
_SAME_BUDGET = 0.05  # share by which trainable parameters may differ in a fair comparison
_FEW_SEEDS = 5
_NOTE = (
    "Accuracy in per cent. Difference from {reference} in points, on the same questions with the same seeds. Intervals "
    "and verdicts hold for new seeds and new questions, and allow for the number of recipes: in 95 % of such studies, "
    "all verdicts for a task are correct, provided that results vary between new seeds no more than between these."
)
_SEARCH_NOTE = (
    "Search: mean accuracy in per cent over the tuning seeds, on questions that are not in the test. At the edge: the "
    "best value is the lowest or highest one tried, and a value beyond it may be better."
)


@dataclass(frozen=True)
class Row:
    """One recipe on one task, or on the mean of all tasks."""

    task: str  # name of the task, or `ALL_TASKS`
    recipe: str  # name of the recipe, or `BASE`
    trainable_parameters: int  # mean over seeds; 0 for the base model
    has_reference_budget: bool  # trainable parameters within 5 % of the reference's
    num_experts: list[list[int]]  # distinct numbers of experts by layer, over the runs of all seeds
    accuracy: float  # mean over seeds, a share
    seeds: int  # number of seeds
    difference: (
        Difference | None
    )  # from the reference; None for the reference, the base model, and without a common seed
    diverged: list[int] = field(default_factory=list)  # seeds whose training diverged: all answers count as wrong


def summarize(results: Sequence[Result], recipes: Sequence[str], tasks: Sequence[str], reference: str) -> list[Row]:
    """Rows of all tasks and recipes that have a finished run, then those of the mean of the tasks.

    Args:
        results: results of any tasks and recipes; those that are not in `recipes` or `tasks` are ignored.
        recipes: names of recipes, in the order of the rows.
        tasks: names of tasks, in the order of the rows.
        reference: the recipe with which the others are compared.
    """
    rows = []
    for task in tasks:
        of_task = [each for each in results if each.task == task]
        marks = {name: _marks([each for each in of_task if each.recipe == name]) for name in (*recipes, BASE)}
        rows += _rows(task, of_task, marks, reference, None)
    if len(tasks) > 1:
        counts = [next((each.total for each in results if each.task == task), 0) for task in tasks]
        marks = {name: _marks_of_tasks(results, name, tasks) for name in (*recipes, BASE)}
        rows += _rows(ALL_TASKS, [each for each in results if each.task in tasks], marks, reference, counts)
    return rows


def _marks(results: Sequence[Result]) -> dict[int, np.ndarray]:
    """Seed -> marks as numbers; all results are of one recipe on one task."""
    return {each.seed: np.array([float(mark) for mark in each.marks]) for each in results}


def _marks_of_tasks(results: Sequence[Result], recipe: str, tasks: Sequence[str]) -> dict[int, np.ndarray]:
    """Marks of all tasks side by side, weighted so that their mean is the mean of the tasks' accuracies."""
    by_task = [_marks([each for each in results if (each.task, each.recipe) == (task, recipe)]) for task in tasks]
    found = {}
    for seed in sorted(set.intersection(*(set(marks) for marks in by_task))):
        parts = [marks[seed] for marks in by_task]
        size = sum(map(len, parts))
        found[seed] = np.concatenate([part * size / (len(parts) * len(part)) for part in parts])
    return found


def _rows(
    task: str,
    results: Sequence[Result],
    marks: Mapping[str, Mapping[int, np.ndarray]],
    reference: str,
    questions_by_task: Sequence[int] | None,
) -> list[Row]:
    """Rows of one task; see `paired_difference` for `questions_by_task`."""
    by_recipe = {name: [each for each in results if each.recipe == name] for name in marks}
    shared = {name: sorted(marks[name].keys() & marks[reference].keys()) for name in marks}
    comparisons = sum(1 for name, seeds in shared.items() if seeds and name not in (reference, BASE))
    budget = _parameters(by_recipe[reference])
    rows = []
    for name, by_seed in marks.items():
        if not by_seed:
            continue
        difference = None
        if shared[name] and name not in (reference, BASE):
            ours, theirs = (np.stack([marks[each][seed] for seed in shared[name]]) for each in (name, reference))
            difference = paired_difference(ours, theirs, comparisons, questions_by_task)
        runs = by_recipe[name]
        parameters = _parameters(runs)
        rows.append(
            Row(
                task,
                name,
                parameters,
                name != BASE and abs(parameters - budget) <= _SAME_BUDGET * budget,
                [list(experts) for experts in dict.fromkeys(tuple(each.num_experts) for each in runs)],
                fmean(float(values.mean()) for values in by_seed.values()),
                len(by_seed),
                difference,
                sorted({each.seed for each in runs if each.diverged_at is not None}),
            )
        )
    return rows


def _parameters(results: Sequence[Result]) -> int:
    return round(fmean(each.trainable_parameters for each in results)) if results else 0


def _cells(row: Row, reference: str) -> list[str]:
    """A row as text, in the order of `HEADER`."""
    values = f"{row.trainable_parameters:,}" if row.trainable_parameters else "-"
    seeds = "-" if row.recipe == BASE else str(row.seeds)
    cells = [row.task, row.recipe, values, seeds, points(row.accuracy, "")]
    if (difference := row.difference) is None:
        return [*cells, "", "", "reference" if row.recipe == reference else ""]
    if difference.seeds != row.seeds:  # some runs are not finished yet
        cells[3] += f", {difference.seeds} paired"
    interval = "" if difference.interval is None else " to ".join(map(points, difference.interval))
    return [*cells, points(difference.value), interval, difference.verdict]


def notes(rows: Sequence[Row], reference: str, results: Sequence[Result]) -> list[str]:
    """Notes below the table: what it means, which trainings diverged, and how long all runs took."""
    found = [_NOTE.format(reference=reference)]
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task and row.recipe != BASE]
        same = [row.recipe for row in of_task if row.has_reference_budget]
        if 1 < len(of_task) != len(same):
            found.append(f"Trainable parameters within 5 % of the reference's on {task}: {', '.join(same)}.")
    for row in rows:
        if row.diverged and row.task != ALL_TASKS:
            seeds = ", ".join(map(str, row.diverged))
            found.append(f"{row.recipe} on {row.task} diverged with seed {seeds}: all answers count as wrong.")
    if any(row.difference.seeds < _FEW_SEEDS for row in rows if row.difference):
        found.append(
            f"Fewer than {_FEW_SEEDS} seeds say little about how much results vary between seeds: intervals are too "
            "narrow in more than 5 % of such studies."
        )
    runs = [each for each in results if each.recipe != BASE]
    if runs:
        training, testing = (
            duration(sum(getattr(each, f"seconds_{part}") for each in runs)) for part in ("training", "testing")
        )
        found.append(
            f"{len(runs)} trainings took {training}, their tests {testing}. Machine of each process: "
            f"{computers(each.machine for each in runs)}."
        )
    return found


def terminal_table(rows: Sequence[Row], reference: str) -> Table:
    """The table, with a line between tasks."""
    table = Table()
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("task", "recipe", "verdict") else "right", overflow="fold")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        is_last = following is None or following.task != row.task
        table.add_row(*map(escape, _cells(row, reference)), end_section=is_last)
    return table


def search_table(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the accuracy of every candidate, and which one is chosen."""
    candidates = list(found[0].accuracies)
    lines = []
    for each in found:
        cells = [
            points(each.accuracies[name], "") + (" (diverged)" if name in each.diverged else "") for name in candidates
        ]
        edges = f" (at the edge: {', '.join(each.edges)})" if each.edges else ""
        lines.append([each.task, each.recipe, *cells, each.chosen.lstrip(MARK) + edges])
    return ["task", "recipe", *(name.lstrip(MARK) for name in candidates), "chosen"], lines


def markdown(rows: Sequence[Row], found: Sequence[Found], reference: str, results: Sequence[Result], left: int) -> str:
    """The search, the table and the notes; `left` is the number of runs without a result."""
    parts = [f"{left} runs are left: all numbers will change."] if left else []
    if found:
        parts += [markdown_table(*search_table(found)), _SEARCH_NOTE]
    parts += [markdown_table(HEADER, [_cells(row, reference) for row in rows]), *notes(rows, reference, results)]
    return "\n\n".join(parts) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """All numbers unrounded, one line per task and recipe."""
    text = io.StringIO()
    columns: tuple[str, ...] = (
        "task",
        "recipe",
        "trainable_parameters",
        "has_reference_budget",
        "seeds",
        "accuracy",
        "difference",
    )
    columns += ("difference_low", "difference_high", "difference_seeds", "verdict", "num_experts", "diverged_seeds")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        line = {name: getattr(row, name) for name in columns[:6]}
        line["num_experts"] = " ".join("-".join(map(str, each)) for each in row.num_experts)
        line["diverged_seeds"] = " ".join(map(str, row.diverged))
        if difference := row.difference:
            low, high = difference.interval or ("", "")
            line |= {"difference": difference.value, "difference_low": low, "difference_high": high}
            line |= {"difference_seeds": difference.seeds, "verdict": difference.verdict}
        writer.writerow(line)
    return text.getvalue()

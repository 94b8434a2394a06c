"""What a comparison has found: the rows of its table, and their text."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from mola.evaluation.differences import Difference, paired_difference, paired_loss_difference
from mola.reporting.formatting import NO_VALUE, duration, machines_text, markdown_table
from mola.studies.comparison.outcomes import ACCURACY, LOSS, Outcome
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.search import Found, search_notes, search_table

ALL_TASKS = "mean of the tasks"
_TEXT_COLUMNS = ("task", "recipe", "verdict")
SAME_BUDGET = 0.05  # share by which trainable parameters may differ in a fair comparison
_FEW_SEEDS = 5


@dataclass(frozen=True)
class Row:
    """One recipe on one task, or on the mean of all tasks."""

    task: str  # name of the task, or `ALL_TASKS`
    recipe: str  # name of the recipe, or `BASE`
    trainable_parameters: int  # mean over seeds; 0 for the base model
    has_reference_budget: bool  # trainable parameters within 5 % of the reference's
    num_experts: list[list[int]]  # distinct numbers of experts by layer, over the runs of all seeds
    accuracy: float | None  # mean over seeds, a share; None for free text
    seeds: int  # number of seeds
    difference: Difference | None  # from the reference; None for the reference, the base model, and no common seed
    diverged: list[int] = field(default_factory=list)  # seeds whose training diverged
    loss: float | None = None  # of free text: mean over seeds, nats per token; None if a training diverged

    @property
    def outcome(self) -> Outcome:
        """What is compared."""
        return LOSS if self.accuracy is None else ACCURACY

    @property
    def value(self) -> float | None:
        """The accuracy or the loss."""
        return self.loss if self.accuracy is None else self.accuracy


def summarize(results: Sequence[Result], recipes: Sequence[str], tasks: Sequence[str], reference: str) -> list[Row]:
    """Rows of all tasks and recipes that have a finished run, then those of the mean of the tasks.

    There is no mean of tasks with free text, since losses of different texts have different scales.

    Args:
        results: results of any tasks and recipes; those that are not in `recipes` or `tasks` are ignored.
        recipes: names of recipes, in the order of the rows.
        tasks: names of tasks, in the order of the rows.
        reference: the recipe with which the others are compared.
    """
    rows, names = [], (*recipes, BASE)
    of_tasks = [each for each in results if each.task in tasks]
    for task in tasks:
        of_task = [each for each in results if each.task == task]
        measured = _scored(of_task, [task], names) if all(each.is_scored for each in of_task) else _free(of_task, names)
        rows += _rows(task, of_task, measured, reference)
    if len(tasks) > 1 and all(each.is_scored for each in of_tasks):
        rows += _rows(ALL_TASKS, of_tasks, _scored(of_tasks, tasks, names), reference)
    return rows


@dataclass(frozen=True)
class _Measured:
    """The results of one task, or of several tasks side by side.

    Attributes:
        values: recipe -> seed -> a number for each question or row; a training on free text that diverged has none.
        means: recipe -> mean accuracy or loss over seeds; None if a training on free text diverged.
        difference: compares the numbers of a recipe with those of the reference, `(seeds, questions)`, for a number of
            comparisons.
        is_scored: whether the numbers are marks of answers; if not, they are losses.
    """

    values: Mapping[str, Mapping[int, np.ndarray]]
    means: Mapping[str, float | None]
    difference: Callable[[np.ndarray, np.ndarray, int], Difference]
    is_scored: bool


def _scored(results: Sequence[Result], tasks: Sequence[str], names: Sequence[str]) -> _Measured:
    """Marks of all tasks side by side, weighted so that their mean is the mean of the tasks' accuracies."""
    counts = [next((each.total for each in results if each.task == task), 0) for task in tasks]

    def difference(marks: np.ndarray, reference: np.ndarray, comparisons: int) -> Difference:
        return paired_difference(marks, reference, comparisons, counts if len(tasks) > 1 else None)

    values = {name: _marks_of_tasks(results, tasks, name) for name in names}
    means = {name: fmean(float(marks.mean()) for marks in seeds.values()) for name, seeds in values.items() if seeds}
    return _Measured(values, means, difference, is_scored=True)


def _marks_of_tasks(results: Sequence[Result], tasks: Sequence[str], recipe: str) -> dict[int, np.ndarray]:
    """Seed -> marks as numbers."""
    by_task = [
        {each.seed: _marks(each) for each in results if (each.task, each.recipe) == (task, recipe)} for task in tasks
    ]
    found = {}
    for seed in sorted(set.intersection(*map(set, by_task))):
        parts = [marks[seed] for marks in by_task]
        size = sum(map(len, parts))
        found[seed] = np.concatenate([part * size / (len(parts) * len(part)) for part in parts])
    return found


def _marks(result: Result) -> np.ndarray:
    return np.array([float(mark) for mark in result.marks or ""])


def _free(results: Sequence[Result], names: Sequence[str]) -> _Measured:
    """Losses of the rows of one task."""
    by_recipe = {name: [each for each in results if each.recipe == name] for name in names}
    tokens = np.array(next((each.tokens for each in results if each.tokens and each.recipe != BASE), []), float)

    def difference(losses: np.ndarray, reference: np.ndarray, comparisons: int) -> Difference:
        return paired_loss_difference(losses, reference, tokens, comparisons)

    values = {
        name: {each.seed: np.array(each.losses) for each in runs if each.losses} for name, runs in by_recipe.items()
    }
    means = {name: _mean_or_none([each.loss for each in runs]) for name, runs in by_recipe.items() if runs}
    return _Measured(values, means, difference, is_scored=False)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _rows(task: str, results: Sequence[Result], measured: _Measured, reference: str) -> list[Row]:
    values, means = measured.values, measured.means
    by_recipe = {name: [each for each in results if each.recipe == name] for name in values}
    shared = {name: sorted(values[name].keys() & values[reference].keys()) for name in values}
    comparisons = sum(1 for name, seeds in shared.items() if seeds and name not in (reference, BASE))
    budget = _parameters(by_recipe[reference])
    rows = []
    for name, mean in means.items():
        runs, difference = by_recipe[name], None
        if shared[name] and name not in (reference, BASE) and None not in (mean, means[reference]):
            ours, theirs = (np.stack([values[each][seed] for seed in shared[name]]) for each in (name, reference))
            difference = measured.difference(ours, theirs, comparisons)
        parameters = _parameters(runs)
        rows.append(
            Row(
                task,
                name,
                parameters,
                name != BASE and abs(parameters - budget) <= SAME_BUDGET * budget,
                [list(experts) for experts in dict.fromkeys(tuple(each.num_experts) for each in runs)],
                mean if measured.is_scored else None,
                len(values[name]),
                difference,
                sorted({each.seed for each in runs if each.diverged_at is not None}),
                None if measured.is_scored else mean,
            )
        )
    return rows


def _parameters(results: Sequence[Result]) -> int:
    return round(fmean(each.trainable_parameters for each in results)) if results else 0


def _header(outcome: Outcome) -> list[str]:
    return ["task", "recipe", "trainable parameters", "seeds", *outcome.columns, "difference", "95 %", "verdict"]


def _cells(row: Row, reference: str) -> list[str]:
    """A row as text, in the order of `_header`."""
    values = f"{row.trainable_parameters:,}" if row.trainable_parameters else "-"
    seeds = "-" if row.recipe == BASE else str(row.seeds)
    outcome = row.outcome
    measured = [NO_VALUE] * len(outcome.columns) if row.value is None else outcome.texts(row.value)
    cells = [row.task, row.recipe, values, seeds, *measured]
    if (difference := row.difference) is None:
        word = "reference" if row.recipe == reference else ""
        return [*cells, "", "", "diverged: no verdict" if row.value is None else word]
    if difference.seeds != row.seeds:  # some runs are not finished yet
        cells[3] += f", {difference.seeds} paired"
    interval = "" if difference.interval is None else " to ".join(map(outcome.signed, difference.interval))
    return [*cells, outcome.signed(difference.value), interval, difference.verdict]


def _by_outcome(rows: Sequence[Row]) -> list[tuple[Outcome, list[Row]]]:
    """The rows of each outcome that occurs, for a table of its own."""
    parts = [(outcome, [row for row in rows if row.outcome is outcome]) for outcome in (ACCURACY, LOSS)]
    return [(outcome, members) for outcome, members in parts if members]


def notes(rows: Sequence[Row], reference: str, results: Sequence[Result]) -> list[str]:
    """Notes below the table: what it means, which trainings diverged, and how long all runs took."""
    found = [outcome.note.format(reference=reference) for outcome, _ in _by_outcome(rows)]
    for task in dict.fromkeys(row.task for row in rows):
        if text := unequal_sizes([row for row in rows if row.task == task]):
            found.append(f"On {task}, {text[0].lower()}{text[1:]}")
    for row in rows:
        if row.diverged and row.task != ALL_TASKS:
            seeds = ", ".join(map(str, row.diverged))
            found.append(f"{row.recipe} on {row.task} diverged with seed {seeds}: {row.outcome.diverged}.")
    if any(row.difference.seeds < _FEW_SEEDS for row in rows if row.difference):
        found.append(
            f"Fewer than {_FEW_SEEDS} seeds say little about how much results vary between seeds: intervals are too "
            "narrow in more than 5 % of such studies."
        )
    runs = [each for each in results if each.recipe != BASE]
    if runs:
        training = duration(sum(each.seconds_training for each in runs))
        testing = duration(sum(each.seconds_testing for each in runs))
        found.append(
            f"{len(runs)} trainings took {training}, their tests {testing}. Machine of each process: "
            f"{machines_text(each.machine for each in runs)}."
        )
    return found


def unequal_sizes(rows: Sequence[Row]) -> str | None:
    """The sizes of the recipes of a task if one of them differs by more than 5 % from the reference."""
    recipes = [row for row in rows if row.recipe != BASE]
    if all(row.has_reference_budget for row in recipes):
        return None
    first, *others = [f"{row.recipe} {{}}{row.trainable_parameters / 1e6:.3g} M" for row in recipes]
    sizes = [first.format("trains ") + " parameters", *(each.format("") for each in others)]
    return f"The recipes differ in size: {', '.join(sizes)}. A larger recipe may be better by its size alone."


def terminal_tables(rows: Sequence[Row], reference: str) -> list[Table]:
    """A table for each outcome, with a line between tasks."""
    tables = []
    for outcome, members in _by_outcome(rows):
        table = Table()
        for name in _header(outcome):
            table.add_column(name, justify="left" if name in _TEXT_COLUMNS else "right", overflow="fold")
        for row, following in zip(members, [*members[1:], None], strict=True):
            is_last = following is None or following.task != row.task
            table.add_row(*map(escape, _cells(row, reference)), end_section=is_last)
        tables.append(table)
    return tables


def markdown(rows: Sequence[Row], found: Sequence[Found], reference: str, results: Sequence[Result], left: int) -> str:
    """The search, the table and the notes; `left` is the number of runs without a result."""
    parts = [f"{left} runs are left: all numbers will change."] if left else []
    if found:
        parts += [markdown_table(*search_table(found)), *search_notes(found)]
    for outcome, members in _by_outcome(rows):
        parts.append(markdown_table(_header(outcome), [_cells(row, reference) for row in members]))
    parts += notes(rows, reference, results)
    return "\n\n".join(parts) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """All numbers unrounded, one line per task and recipe."""
    names = ["task", "recipe", "trainable_parameters", "has_reference_budget", "seeds", "accuracy"]
    names += ["loss"] if any(row.outcome is LOSS for row in rows) else []
    of_difference = ["difference", "difference_low", "difference_high", "difference_seeds", "verdict"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *of_difference, "num_experts", "diverged_seeds"])
    for row in rows:
        difference: Sequence[Any] = [""] * len(of_difference)
        if (found := row.difference) is not None:
            difference = found.value, *(found.interval or ("", "")), found.seeds, found.verdict
        experts = " ".join("-".join(map(str, each)) for each in row.num_experts)
        values = [getattr(row, name) for name in names]  # None becomes an empty cell
        writer.writerow([*values, *difference, experts, " ".join(map(str, row.diverged))])
    return text.getvalue()

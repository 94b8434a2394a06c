"""What a comparison has found: the choices of its search, the rows of its table, their text and their picture."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from mola.errors import MolaError
from mola.evaluation.differences import Difference, paired_difference
from mola.reporting.formatting import duration, machines_text, markdown_table, points
from mola.reporting.model_card import why_no_matplotlib
from mola.studies.comparison.options import MARK, CompareOptions
from mola.studies.comparison.record import BASE, Result

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


# ---------------------------------------------------------------------- the search for options


@dataclass(frozen=True)
class Found:
    """The search result for one recipe on one task."""

    task: str
    recipe: str
    accuracies: dict[str, float]  # candidate -> mean accuracy over the tuning seeds
    chosen: str  # the best candidate; the first one of equal candidates
    edges: list[str] = field(default_factory=list)  # options whose best value is the lowest or highest one tried
    diverged: dict[str, list[int]] = field(default_factory=dict)  # candidate -> seeds whose training diverged


def search_results(options: CompareOptions, results: Sequence[Result]) -> list[Found]:
    """Choose a candidate for every task and recipe. All runs of the search must be in `results`."""
    by_key = {result.key: result for result in results}
    found = []
    for task, recipe in dict.fromkeys((key.task, key.recipe) for key in options.runs):
        means, diverged = {}, {}
        for candidate in options.candidates:
            keys = [key for key in options.tuning_runs if (key.task, key.recipe) == (task, recipe + candidate)]
            means[candidate] = fmean(by_key[key].accuracy for key in keys)
            if seeds := [key.seed for key in keys if by_key[key].diverged_at is not None]:
                diverged[candidate] = seeds
        chosen = max(means, key=lambda candidate: round(means[candidate], 9))  # equal means may differ by rounding
        found.append(Found(task, recipe, means, chosen, _edges(options.candidates, chosen), diverged))
    return found


def _edges(candidates: Mapping[str, Mapping[str, Any]], chosen: str) -> list[str]:
    """Options whose chosen value is the lowest or highest one tried, so that a better value may lie beyond."""
    found = []
    for name, best in candidates[chosen].items():
        values = {candidate[name] for candidate in candidates.values()}
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if is_number and len(values) > 1 and best in (min(values), max(values)):
            found.append(name)
    return found


# ---------------------------------------------------------------------- the table


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
    difference: Difference | None  # from the reference; None for the reference, the base model, and no common seed
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
        marks = {name: _marks(of_task, task, name) for name in (*recipes, BASE)}
        rows += _rows(task, of_task, marks, reference, None)
    if len(tasks) > 1:
        counts = [next((each.total for each in results if each.task == task), 0) for task in tasks]
        marks = {name: _marks_of_tasks(results, tasks, name) for name in (*recipes, BASE)}
        rows += _rows(ALL_TASKS, [each for each in results if each.task in tasks], marks, reference, counts)
    return rows


def _marks(results: Sequence[Result], task: str, recipe: str) -> dict[int, np.ndarray]:
    """Seed -> marks as numbers."""
    chosen = [each for each in results if (each.task, each.recipe) == (task, recipe)]
    return {each.seed: np.array([float(mark) for mark in each.marks]) for each in chosen}


def _marks_of_tasks(results: Sequence[Result], tasks: Sequence[str], recipe: str) -> dict[int, np.ndarray]:
    """Marks of all tasks side by side, weighted so that their mean is the mean of the tasks' accuracies."""
    by_task = [_marks(results, task, recipe) for task in tasks]
    found = {}
    for seed in sorted(set.intersection(*map(set, by_task))):
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
        training = duration(sum(each.seconds_training for each in runs))
        testing = duration(sum(each.seconds_testing for each in runs))
        found.append(
            f"{len(runs)} trainings took {training}, their tests {testing}. Machine of each process: "
            f"{machines_text(each.machine for each in runs)}."
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
    names = ["task", "recipe", "trainable_parameters", "has_reference_budget", "seeds", "accuracy"]
    of_difference = ["difference", "difference_low", "difference_high", "difference_seeds", "verdict"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *of_difference, "num_experts", "diverged_seeds"])
    for row in rows:
        difference: Sequence[Any] = [""] * len(of_difference)
        if (found := row.difference) is not None:
            difference = found.value, *(found.interval or ("", "")), found.seeds, found.verdict
        experts = " ".join("-".join(map(str, each)) for each in row.num_experts)
        values = [getattr(row, name) for name in names]
        writer.writerow([*values, *difference, experts, " ".join(map(str, row.diverged))])
    return text.getvalue()


# ---------------------------------------------------------------------- the picture, which needs matplotlib


def check_matplotlib() -> None:
    """Raise if matplotlib is missing or cannot be imported."""
    if (reason := why_no_matplotlib()) is not None:
        raise MolaError(f"`plots` needs matplotlib: {reason}. pip install 'mola-peft[plot]', or leave the option out.")


def draw_differences(rows: Sequence[Row], form: str) -> bytes | None:
    """One picture with a panel for each task, in the format `png` or `svg`; None if no row has an interval yet."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which chooses a window system

    compared = [row for row in rows if row.difference is not None and row.difference.interval is not None]
    parts = [(task, list(members)) for task, members in groupby(compared, key=lambda row: row.task)]
    if not parts:
        return None
    heights = [1.2 + 0.28 * len(members) for _, members in parts]  # inches
    with rc_context({"svg.hashsalt": "mola", "font.size": 9}):
        figure = Figure(figsize=(6.4, sum(heights)), layout="constrained")
        all_axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (task, members) in zip(all_axes, parts, strict=True):
            for place, row in enumerate(members):
                assert row.difference is not None
                assert row.difference.interval is not None
                ends = [100 * bound for bound in row.difference.interval]
                axes.plot(ends, [place, place], color="C0", linewidth=2.0)
                axes.plot(100 * row.difference.value, place, "o", color="C0", markersize=5)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set(title=task, xlabel="points above the reference (95 % interval)", ylim=(len(members) - 0.5, -0.5))
            axes.set_yticks(range(len(members)), [row.recipe for row in members])
            axes.grid(axis="x", alpha=0.3)
        picture = io.BytesIO()
        figure.savefig(picture, format=form, dpi=130, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()

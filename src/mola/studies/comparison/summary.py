"""From finished runs to the rows of a table: by task, and over all tasks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

import numpy as np

from mola.evaluation.differences import Difference, Mean, Part, mean_accuracy, paired_difference
from mola.studies.comparison.curve import steps_to
from mola.studies.comparison.marks import curve_of, marks_by_seed
from mola.studies.comparison.record import BASE, Result

ALL_TASKS = "mean of the tasks"
AT_END = "at the end"
OVER_TRAINING = "over the training"
_SAME_BUDGET = 0.05  # trained values that differ by no more are one group


@dataclass(frozen=True)
class Row:
    """One recipe on one task, or on all."""

    task: str  # name of the task, or `ALL_TASKS`
    recipe: str  # name of the recipe, or `BASE`
    trainable_parameters: int  # mean over seeds; 0 for the base model
    # 0, 1, ... by trained values, see `budget_groups`; None for the base model
    budget_group: int | None
    num_experts: list[list[int]]  # experts by layer of each seed's run, equal ones once
    mean: Mean  # accuracy
    # to the reference; None for the reference itself, for the base model, and without a common seed
    difference: Difference | None
    measure: str = AT_END  # which accuracy: at the end of the training, or its mean over the tests on the way
    steps_to_target: list[float | None] | None = None  # of each seed, None where it is never reached; None: not asked
    diverged: list[int] = field(default_factory=list)  # seeds whose training has: all answers count as wrong


def summarize(
    results: Sequence[Result],
    recipes: Sequence[str],
    tasks: Sequence[str],
    reference: str,
    target: float | None = None,
) -> list[Row]:
    """Rows for all tasks and recipes with at least one finished run, in the order of these names.

    `reference` is the recipe that the others are compared with; results of recipes and tasks not named are left out.
    With tests on the way every table comes twice, see `Row.measure`.
    """
    rows = []
    for table in marks_of_tables(results, (*recipes, BASE), tasks):
        sizes = {name: _parameters(results, name, table.task) for name in recipes if table.marks[name]}
        groups = budget_groups(sizes, reference)
        for row in _rows(table, reference, results, groups):
            steps = None
            if target and table.measure == OVER_TRAINING and table.task != ALL_TASKS:
                steps = _steps_to(target, [each for each in _of(results, row.recipe) if each.task == table.task])
            rows.append(replace(row, steps_to_target=steps))
    return rows


class TableMarks(NamedTuple):
    """What one table is made from."""

    measure: str
    task: str
    marks: dict[str, dict[int, np.ndarray]]  # by recipe and seed
    parts: list[Part]  # of the questions, see `mola.evaluation.differences.paired_difference`


def marks_of_tables(results: Sequence[Result], names: Sequence[str], tasks: Sequence[str]) -> Iterator[TableMarks]:
    """Of every table that there is."""
    tested = [each for each in results if each.recipe in names]  # others have other questions, those of a search
    questions = {each.task: each.total for each in tested}
    for measure in (AT_END, OVER_TRAINING) if any(each.curve for each in results) else (AT_END,):
        over = measure == OVER_TRAINING
        for task in tasks:
            by_name = {name: [each for each in _of(results, name) if each.task == task] for name in names}
            marks = {name: marks_by_seed(found, over) for name, found in by_name.items()}
            yield TableMarks(measure, task, marks, [Part(questions.get(task, 0), 1.0)])
        if len(tasks) > 1:
            marks = {name: _over_tasks(results, name, tasks, over) for name in names}
            parts = [Part(questions.get(task, 0), 1 / len(tasks)) for task in tasks]
            yield TableMarks(measure, ALL_TASKS, marks, parts)


def _steps_to(target: float, results: Sequence[Result]) -> list[float | None]:
    curves = [[(step, float(marks.mean())) for step, marks in curve_of(each)] for each in results if each.curve]
    return [steps_to(target, curve) for curve in curves]


def budget_groups(parameters: dict[str, int], reference: str) -> dict[str, int]:
    """Recipes with about equal numbers of trained values: name -> number of the group, smallest budget first.

    One group are those within 5 % of the reference; of the others, those within 5 % of the smallest of a group.
    """
    anchor = parameters.get(reference, 0)
    near = [name for name in parameters if abs(parameters[name] - anchor) <= _SAME_BUDGET * anchor]
    groups = [near] if near else []
    smallest = -1
    for name in sorted(parameters.keys() - {*near}, key=lambda name: (parameters[name], name)):
        if smallest < 0 or parameters[name] > smallest * (1 + _SAME_BUDGET):
            smallest = parameters[name]
            groups.append([])
        groups[-1].append(name)
    groups.sort(key=lambda names: min(parameters[name] for name in names))
    return {name: number for number, names in enumerate(groups) for name in names}


def _rows(table: TableMarks, reference: str, results: Sequence[Result], groups: Mapping[str, int]) -> list[Row]:
    pairs = [(name, reference) for name in table.marks if name not in (reference, BASE)]
    differences, task = differences_of(table, pairs), table.task
    rows = []
    for name, by_seed in table.marks.items():
        if by_seed:
            mean = mean_accuracy([float(row.mean()) for row in by_seed.values()])
            own = [each for each in _of(results, name) if task in (ALL_TASKS, each.task)]
            experts = [each.num_experts for each in own]
            diverged = sorted({each.seed for each in own if each.diverged_at is not None})
            unique = [list(values) for values in dict.fromkeys(map(tuple, experts))]
            parameters = _parameters(results, name, task)
            difference = differences.get((name, reference))
            row = Row(task, name, parameters, groups.get(name), unique, mean, difference, table.measure)
            rows.append(replace(row, diverged=diverged))
    return rows


def differences_of(table: TableMarks, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Difference]:
    """The first recipe of each pair minus the second, on the seeds that both have; left out without any.

    Joint intervals, p and verdicts allow for all pairs with a common seed.
    """
    marks, found = table.marks, {}
    shared = {pair: sorted(marks[pair[0]].keys() & marks[pair[1]].keys()) for pair in pairs}
    for pair, seeds in shared.items():
        if seeds:
            ours, theirs = (np.stack([marks[name][seed] for seed in seeds]) for name in pair)
            found[pair] = paired_difference(ours, theirs, sum(map(bool, shared.values())), table.parts)
    return found


def _of(results: Sequence[Result], recipe: str) -> list[Result]:
    return [each for each in results if each.recipe == recipe]


def _parameters(results: Sequence[Result], recipe: str, task: str) -> int:
    found = [each for each in _of(results, recipe) if task in (ALL_TASKS, each.task)]
    return round(fmean(each.trainable_parameters for each in found))


def _over_tasks(results: Sequence[Result], recipe: str, tasks: Sequence[str], over: bool) -> dict[int, np.ndarray]:
    """Marks of all tasks side by side, weighted so that their mean is the mean of the tasks' accuracies."""
    by_task = [marks_by_seed([each for each in _of(results, recipe) if each.task == task], over) for task in tasks]
    complete = set.intersection(*(set(marks) for marks in by_task))
    found = {}
    for seed in sorted(complete):
        rows = [marks[seed] for marks in by_task]
        size = sum(map(len, rows))
        found[seed] = np.concatenate([row * size / (len(rows) * len(row)) for row in rows])
    return found

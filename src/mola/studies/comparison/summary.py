"""From finished runs to the rows of a table: by task, and over all tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from mola.evaluation.differences import Difference, Mean, mean_accuracy, paired_differences
from mola.studies.comparison.record import BASE, Result

ALL_TASKS = "mean of the tasks"
_SAME_BUDGET = 0.05  # trained values that differ by less are one group


@dataclass(frozen=True)
class Row:
    """One recipe on one task, or on all."""

    task: str  # name of the task, or `ALL_TASKS`
    recipe: str  # name of the recipe, or `BASE`
    trainable_parameters: int  # mean over seeds; 0 for the base model
    # 0, 1, ... by trained values, which differ by less than 5 % from the group's smallest; None for the base model
    budget_group: int | None
    num_experts: list[list[int]]  # experts by layer of each seed's run, equal ones once
    mean: Mean  # accuracy
    # to the reference; None for the reference itself, for the base model, and without a common seed
    difference: Difference | None


def summarize(results: Sequence[Result], recipes: Sequence[str], tasks: Sequence[str], reference: str) -> list[Row]:
    """Rows for all tasks and recipes with at least one finished run, in the order of these names.

    `reference` is the recipe that the others are compared with; results of recipes and tasks not named are left out.
    """
    groups = budget_groups({name: _parameters(results, name) for name in recipes if _of(results, name)})
    rows = []
    for task in tasks:
        marks = {name: _marks([each for each in _of(results, name) if each.task == task]) for name in (*recipes, BASE)}
        rows += _rows(task, marks, reference, results, groups)
    if len(tasks) > 1:
        both = {name: _over_tasks(results, name, tasks) for name in (*recipes, BASE)}
        rows += _rows(ALL_TASKS, both, reference, results, groups)
    return rows


def budget_groups(parameters: dict[str, int]) -> dict[str, int]:
    """Recipes with about equal numbers of trained values: name -> number of the group, smallest budget first."""
    groups: dict[str, int] = {}
    number, smallest = -1, 0
    for name in sorted(parameters, key=lambda name: (parameters[name], name)):
        if number < 0 or parameters[name] > smallest * (1 + _SAME_BUDGET):
            number, smallest = number + 1, parameters[name]
        groups[name] = number
    return groups


def _rows(
    task: str,
    marks: dict[str, dict[int, np.ndarray]],
    reference: str,
    results: Sequence[Result],
    groups: dict[str, int],
) -> list[Row]:
    differences = _differences(marks, reference)
    rows = []
    for name, by_seed in marks.items():
        if by_seed:
            mean = mean_accuracy([float(row.mean()) for row in by_seed.values()])
            experts = [each.num_experts for each in _of(results, name) if task in (ALL_TASKS, each.task)]
            unique = [list(values) for values in dict.fromkeys(map(tuple, experts))]
            parameters = _parameters(results, name)
            rows.append(Row(task, name, parameters, groups.get(name), unique, mean, differences.get(name)))
    return rows


def _differences(marks: dict[str, dict[int, np.ndarray]], reference: str) -> dict[str, Difference]:
    """Recipes with other seeds than most are adjusted for in groups of equal seeds."""
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for name, by_seed in marks.items():
        common = tuple(sorted(by_seed.keys() & marks[reference].keys()))
        if name not in (reference, BASE) and common:
            by_seeds.setdefault(common, []).append(name)
    found: dict[str, Difference] = {}
    for seeds, names in by_seeds.items():
        stacked = {name: np.stack([marks[name][seed] for seed in seeds]) for name in names}
        found |= paired_differences(stacked, np.stack([marks[reference][seed] for seed in seeds]))
    return found


def _of(results: Sequence[Result], recipe: str) -> list[Result]:
    return [each for each in results if each.recipe == recipe]


def _parameters(results: Sequence[Result], recipe: str) -> int:
    return round(fmean(each.trainable_parameters for each in _of(results, recipe)))


def _marks(results: Sequence[Result]) -> dict[int, np.ndarray]:
    return {each.seed: np.array([float(mark) for mark in each.marks]) for each in results}


def _over_tasks(results: Sequence[Result], recipe: str, tasks: Sequence[str]) -> dict[int, np.ndarray]:
    """Marks of all tasks side by side, weighted so that their mean is the mean of the tasks' accuracies."""
    by_task = [_marks([each for each in _of(results, recipe) if each.task == task]) for task in tasks]
    complete = set.intersection(*(set(marks) for marks in by_task))
    found = {}
    for seed in sorted(complete):
        rows = [marks[seed] for marks in by_task]
        size = sum(map(len, rows))
        found[seed] = np.concatenate([row * size / (len(rows) * len(row)) for row in rows])
    return found

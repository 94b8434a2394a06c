"""The search for options: what it has found for each recipe, and how many seeds a comparison with them needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from mola.evaluation.differences import LEVEL, mean_squares
from mola.studies.comparison.marks import marks_by_seed
from mola.studies.comparison.options import CompareOptions, Key
from mola.studies.comparison.power import Components, seeds_needed
from mola.studies.comparison.record import Result
from mola.studies.comparison.summary import AT_END, OVER_TRAINING

_POWER = 0.8


@dataclass(frozen=True)
class Found:
    """What the search has found for a recipe on a task."""

    task: str
    recipe: str
    accuracies: dict[str, float]  # of every candidate: mean over the tuning seeds of what is compared
    chosen: str  # the best candidate; of equal ones the first
    edges: list[str] = field(default_factory=list)  # options whose best number is the lowest or highest one tried
    measure: str = AT_END  # which accuracy, see `mola.studies.comparison.summary.Row`
    # candidates and the tuning seeds with which their trainings diverged: all answers count as wrong
    diverged: dict[str, list[int]] = field(default_factory=dict)


def found_by_search(options: CompareOptions, results: Sequence[Result]) -> list[Found]:
    """What is chosen for every recipe and task whose search is complete."""
    done = {result.key for result in results}
    found = []
    for task, recipe in dict.fromkeys((key.task, key.recipe) for key in options.runs):
        keys = [key for key in options.tuning_runs if (key.task, key.plain_recipe) == (task, recipe)]
        if keys and done.issuperset(keys):
            means = {mark: _outcome(results, task, recipe + mark, options) for mark in options.candidates}
            # means of as many right answers differ in their last digits
            chosen = max(means, key=lambda mark: round(means[mark], 9))
            edges, diverged = _edges(options.candidates, chosen), _diverged(results, keys)
            found.append(Found(task, recipe, means, chosen, edges, _measure(options), diverged))
    return found


def _diverged(results: Sequence[Result], keys: Sequence[Key]) -> dict[str, list[int]]:
    by_candidate: dict[str, list[int]] = {}
    for each in results:
        if each.key in keys and each.diverged_at is not None:
            by_candidate.setdefault(each.key.candidate, []).append(each.seed)
    return by_candidate


def _edges(candidates: Mapping[str, Mapping[str, Any]], chosen: str) -> list[str]:
    """Options beyond whose values a better one may lie; those that are no numbers have no order."""
    found = []
    for name, best in candidates[chosen].items():
        values = {each[name] for each in candidates.values()}
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if is_number and len(values) > 1 and best in (min(values), max(values)):
            found.append(name)
    return found


def _measure(options: CompareOptions) -> str:
    """What a search compares: the accuracy over the training where there are curves."""
    return AT_END if options.test_every is None else OVER_TRAINING


def _outcome(results: Sequence[Result], task: str, recipe: str, options: CompareOptions) -> float:
    marks = _marks(results, task, recipe, options)
    return fmean(float(each.mean()) for each in marks.values())


def _marks(results: Sequence[Result], task: str, recipe: str, options: CompareOptions) -> dict[int, np.ndarray]:
    chosen = [each for each in results if (each.task, each.recipe) == (task, recipe)]
    return marks_by_seed(
        [each for each in chosen if each.seed in options.tuning_seeds], _measure(options) == OVER_TRAINING
    )


@dataclass(frozen=True)
class Power:
    """What a comparison can see, from how much the recipes of the search differ between seeds and questions."""

    task: str
    margin: float  # points
    seeds: int  # of the comparison
    questions: int  # of the test
    needed: int | None  # seeds, to see a difference of `margin` with a probability of 0.8; None: 1,000 are not enough
    # the standard deviation between seeds of a difference, in points, questions being the same
    seed_deviation: float
    measure: str = AT_END  # which accuracy, see `mola.studies.comparison.summary.Row`


def power_of(
    options: CompareOptions, results: Sequence[Result], found: Sequence[Found], questions: Mapping[str, int]
) -> list[Power]:
    """Power on every task before a fresh seed is trained; none with one tuning seed, one question of it or one recipe.

    `questions` are the test's, by task.
    """
    powers = []
    recipes = [*(options.recipes or {})]
    for task in dict.fromkeys(each.task for each in found):
        chosen = {each.recipe: each.recipe + each.chosen for each in found if each.task == task}
        marks = {name: _marks(results, task, full, options) for name, full in chosen.items()}
        if len(marks) < len(recipes) or len(recipes) < 2 or len(options.tuning_seeds) < 2:
            continue
        squares = _squares(marks, str(options.reference), options.tuning_seeds)
        if squares[0][1][1] < 2:  # nothing tells how much questions differ
            continue
        parts = Components.pooled(squares)
        number = questions[task]
        needed = seeds_needed(options.margin / 100, parts, number, len(recipes) - 1, _POWER, LEVEL)
        deviation = 100 * parts.between_seeds(number) ** 0.5
        powers.append(Power(task, options.margin, len(options.seeds), number, needed, deviation, _measure(options)))
    return powers


def _squares(marks: Mapping[str, Mapping[int, np.ndarray]], reference: str, seeds: Sequence[int]) -> list[tuple]:
    stacked = {name: np.stack([by_seed[seed] for seed in seeds]) for name, by_seed in marks.items()}
    differences = [values - stacked[reference] for name, values in stacked.items() if name != reference]
    return [(mean_squares(each), each.shape) for each in differences]

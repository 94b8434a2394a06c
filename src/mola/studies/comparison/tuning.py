"""The search for options: what it has found for each recipe, and how many seeds a comparison with them needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from mola.evaluation.differences import LEVEL, mean_squares
from mola.studies.comparison.marks import marks_by_seed
from mola.studies.comparison.options import CompareOptions
from mola.studies.comparison.power import Components, seeds_needed
from mola.studies.comparison.record import Result

_POWER = 0.8


@dataclass(frozen=True)
class Found:
    """What the search has found for a recipe on a task."""

    task: str
    recipe: str
    accuracies: dict[str, float]  # of every candidate: mean over the tuning seeds of what is compared
    chosen: str  # the best candidate; of equal ones the first

    @property
    def is_at_the_edge(self) -> bool:
        """Whether a value beyond those tried might be better still; with one option and its values in order."""
        names = list(self.accuracies)
        return len(names) > 1 and self.chosen in (names[0], names[-1])


def found_by_search(options: CompareOptions, results: Sequence[Result]) -> list[Found]:
    """What is chosen for every recipe and task whose search is complete."""
    done = {result.key for result in results}
    found = []
    for task, recipe in dict.fromkeys((key.task, key.recipe) for key in options.runs):
        keys = [key for key in options.tuning_runs if (key.task, key.plain_recipe) == (task, recipe)]
        if keys and done.issuperset(keys):
            means = {mark: _outcome(results, task, recipe + mark, options) for mark in options.candidates}
            found.append(Found(task, recipe, means, max(means, key=lambda mark: means[mark])))
    return found


def _outcome(results: Sequence[Result], task: str, recipe: str, options: CompareOptions) -> float:
    marks = _marks(results, task, recipe, options)
    return fmean(float(each.mean()) for each in marks.values())


def _marks(results: Sequence[Result], task: str, recipe: str, options: CompareOptions) -> dict[int, np.ndarray]:
    """What a search compares: the accuracy over the training where there are curves, else at the end."""
    chosen = [each for each in results if (each.task, each.recipe) == (task, recipe)]
    return marks_by_seed([each for each in chosen if each.seed in options.tuning_seeds], options.test_every is not None)


@dataclass(frozen=True)
class Power:
    """What a comparison can see, from how much the recipes of the search differ between seeds and questions."""

    task: str
    margin: float  # points
    seeds: int  # of the comparison
    questions: int  # of the test
    needed: int | None  # seeds, to see a difference of `margin` with a probability of 0.8; None: more questions are
    # the standard deviation between seeds of a difference, in points, questions being the same
    seed_deviation: float


def power_of(
    options: CompareOptions, results: Sequence[Result], found: Sequence[Found], questions: Mapping[str, int]
) -> list[Power]:
    """Power on every task before a fresh seed is trained; none with one tuning seed or one recipe.

    `questions` are the test's, by task.
    """
    powers = []
    recipes = [*(options.recipes or {})]
    for task in dict.fromkeys(each.task for each in found):
        chosen = {each.recipe: each.recipe + each.chosen for each in found if each.task == task}
        marks = {name: _marks(results, task, full, options) for name, full in chosen.items()}
        if len(marks) < len(recipes) or len(recipes) < 2 or len(options.tuning_seeds) < 2:
            continue
        parts = Components.pooled(_squares(marks, str(options.reference), options.tuning_seeds))
        number = questions[task]
        needed = seeds_needed(options.margin / 100, parts, number, len(recipes) - 1, _POWER, LEVEL)
        deviation = 100 * parts.between_seeds(number) ** 0.5
        powers.append(Power(task, options.margin, len(options.seeds), number, needed, deviation))
    return powers


def _squares(marks: Mapping[str, Mapping[int, np.ndarray]], reference: str, seeds: Sequence[int]) -> list[tuple]:
    stacked = {name: np.stack([by_seed[seed] for seed in seeds]) for name, by_seed in marks.items()}
    differences = [values - stacked[reference] for name, values in stacked.items() if name != reference]
    return [(mean_squares(each), each.shape) for each in differences]

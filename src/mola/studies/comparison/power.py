"""How many seeds it takes to see a difference, from the variance between seeds and between questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mola.evaluation.differences import MeanSquares, Part, unseen_share

_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Components:
    """Variances of a paired difference: of seeds, of questions, and what is left of a single answer."""

    seeds: float
    questions: float
    rest: float

    @classmethod
    def pooled(cls, squares: Sequence[tuple[MeanSquares, tuple[int, int]]]) -> "Components":
        r"""Mean over several differences of equal shape `(S, Q)`.

        `MS_seeds = Q s^2_seeds + s^2_rest`, `MS_questions = S s^2_questions + s^2_rest`; none is less than 0.
        """
        (num_seeds, num_questions) = squares[0][1]
        by_seed, by_question, rest = (
            sum(each[index] for each, _ in squares) / len(squares) for index in range(len(MeanSquares._fields))
        )
        return cls(max(0.0, by_seed - rest) / num_questions, max(0.0, by_question - rest) / num_seeds, rest)

    def between_seeds(self, questions: int) -> float:
        """Variance between seeds of the mean over the same questions."""
        return self.seeds + self.rest / questions


def seeds_needed(
    margin: float, parts: Components, questions: int, comparisons: int, power: float, level: float
) -> int | None:
    r"""Fewest seeds with which a true difference is found with a probability of `power`.

    With `S` seeds the difference of one recipe to the reference has the standard error
        sqrt(s^2_seeds / S + s^2_questions / Q + s^2_rest / (S Q) + 2 / Q^2)
    (the last for questions of another matter, as intervals have it), and is tested two-sided at
    `(1 - level) / comparisons` with `S - 1` degrees of freedom (noncentral t). It has to be above what so few questions
    cannot exclude, too, see `unseen_share`.

    Args:
        margin: the true difference.
        parts: its variances.
        questions: `Q`.
        comparisons: recipes that are compared with the reference.
        power: probability to find it.
        level: of all comparisons together.

    Returns:
        The number, or None if 1,000 are not enough: where questions are too few to show the margin, or seeds differ
        too much.
    """
    least = unseen_share(1 - (1 - level) / comparisons, [Part(questions, 1.0)])
    if margin <= least:
        return None
    for seeds in range(2, _MOST_SEEDS + 1):
        error = math.sqrt(parts.between_seeds(questions) / seeds + parts.questions / questions + 2 / questions**2)
        bound = float(stats.t.ppf(1 - (1 - level) / (2 * comparisons), seeds - 1))
        with np.errstate(divide="ignore"):  # SciPy 1.13 divides by zero far from the mean, and gives 0 all the same
            reached = float(stats.nct.sf(max(bound, least / error), seeds - 1, margin / error))
        if reached >= power:
            return seeds
    return None

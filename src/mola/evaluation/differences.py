"""Whether answers to the same questions differ: means, intervals, paired differences. Statistics only, no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """Mean accuracy over seeds."""

    value: float  # the mean
    # Student's t interval over seeds, for these questions, as far as it lies between 0 and 1; None with one seed
    interval_95: tuple[float, float] | None
    seeds: int  # number of seeds


@dataclass(frozen=True)
class Difference:
    """A recipe minus the reference, on the same questions with the same seeds."""

    value: float  # mean difference of the accuracies. Intervals are given as far as differences can reach.
    # t interval over seeds: would other seeds say the same, on these questions? None with one seed
    seeds_95: tuple[float, float] | None
    # t interval over questions, each the mean over seeds: would other questions say the same?
    questions_95: tuple[float, float]
    # for other seeds *and* other questions, see `two_way_error` and `_interval`; None with one seed
    both_95: tuple[float, float] | None
    # the same at a level at which all recipes compared are right together in 95 % of studies (Bonferroni)
    joint_95: tuple[float, float] | None
    p_adjusted: float | None  # two-sided, of the interval over both, times the number of recipes; at most 1
    # `better` or `worse` if `joint_95` excludes 0, else the largest difference it leaves room for; see `verdict_of`
    verdict: str
    seeds: int  # number of seeds


class Part(NamedTuple):
    """Questions that count alike, of which none is in another part."""

    questions: int  # how many
    # by how much a mean difference moves from 0, if one of the recipes knows all of them, the other none
    reach: float


def mean_accuracy(accuracies: Sequence[float]) -> Mean:
    """Mean over seeds.

    Args:
        accuracies: one per seed, at least one.
    """
    values = np.asarray(accuracies, dtype=float)
    return Mean(float(values.mean()), t_interval(values, 0.0, 1.0) if len(values) > 1 else None, len(values))


def paired_differences(
    recipes: dict[str, np.ndarray],
    reference: np.ndarray,
    comparisons: int | None = None,
    parts: Sequence[Part] | None = None,
) -> dict[str, Difference]:
    """Every recipe against the reference.

    Args:
        recipes: name -> marks `(seeds, questions)`; all from 0 to 1, if there are no `parts`.
        reference: marks of the reference, with the same seeds and questions.
        comparisons: how many differences are looked at together; None for as many as there are recipes here.
        parts: of the questions, if they do not all count alike or their marks are others.
    """
    family = comparisons or len(recipes)
    return {name: paired_difference(marks, reference, family, parts) for name, marks in recipes.items()}


def paired_difference(
    marks: np.ndarray, reference: np.ndarray, comparisons: int = 1, parts: Sequence[Part] | None = None
) -> Difference:
    """One of `paired_differences`; the arguments are as there."""
    values = marks.astype(float) - reference
    value, parts = float(values.mean()), parts or [Part(values.shape[1], 1.0)]
    reach = sum(part.reach for part in parts)
    over_questions = _interval(value, _error_over_questions(values), parts, LEVEL)
    if min(values.shape) < 2:
        few = "one seed" if len(values) < 2 else "one question"
        return Difference(value, None, over_questions, None, None, None, f"{few}: no verdict", len(values))
    spread = two_way_error(values)
    joint = _interval(value, spread, parts, 1 - (1 - LEVEL) / comparisons)
    return Difference(
        value,
        t_interval(values.mean(1), -reach, reach),
        over_questions,
        _interval(value, spread, parts, LEVEL),
        joint,
        min(1.0, comparisons * _two_sided(value, spread, parts)),
        verdict_of(value, joint),
        len(values),
    )


def verdict_of(value: float, joint: tuple[float, float]) -> str:
    """What an interval of a difference says: `better`, `worse`, or what it leaves room for.

    "No difference above X points" is a result, not a lack of one: with the interval's confidence the recipes are that
    near to each other; it is rounded up. A difference that is certain but small is called better or worse all the same.
    """
    low, high = joint
    if low > 0 or high < 0:
        return "better" if value > 0 else "worse"
    bound = math.ceil(round(1000 * max(-low, high), 9)) / 10
    return f"no difference above {bound:.1f} points"


class Spread(NamedTuple):
    """Standard error of a mean, with its degrees of freedom."""

    error: float
    df: float


def two_way_error(values: np.ndarray) -> Spread:
    r"""Standard error of the mean of values by seed and question, for other seeds and other questions.

    Both count as drawn at random, and do not depend on each other (a crossed design). With the mean squares of
    the two-way table without repetition, `S` seeds and `Q` questions:
        Var(mean) = (MS_seeds + MS_questions - MS_rest) / (S Q)
    which is at least what either alone gives. Degrees of freedom after Satterthwaite, of the same sum.

    Args:
        values: `(S, Q)`, at least two of each.

    Source: Satterthwaite 1946, Biometrics Bulletin 2:110; Searle, Casella, McCulloch 1992, Variance Components, 4.
    """
    squares = mean_squares(values)
    shape = np.array([values.shape[0] - 1, values.shape[1] - 1])
    total = max(squares.seeds + squares.questions - squares.rest, squares.seeds, squares.questions)
    if not total > 0 or np.ptp(values) == 0:  # rounding leaves a little of no variance
        return Spread(0.0, float(shape.min()))
    parts = np.array([squares.seeds, squares.questions, squares.rest]) ** 2 / [*shape, shape.prod()]
    return Spread(math.sqrt(total / values.size), max(1.0, float(total**2 / parts.sum())))


class MeanSquares(NamedTuple):
    """Of a two-way table without repetition; each is 0 where all values are equal."""

    seeds: float
    questions: float
    rest: float


def mean_squares(values: np.ndarray) -> MeanSquares:
    """The mean squares of `(S, Q)` values, at least two of each."""
    num_seeds, num_questions = values.shape
    by_seed, by_question = values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_question + values.mean()
    return MeanSquares(
        num_questions * float(by_seed.var(ddof=1)),
        num_seeds * float(by_question.var(ddof=1)),
        float((rest**2).sum()) / ((num_seeds - 1) * (num_questions - 1)),
    )


def _error_over_questions(values: np.ndarray) -> Spread:
    """For other questions with these seeds."""
    means = values.mean(0)
    return Spread(float(stats.sem(means)) if np.ptp(means) > 0 else 0.0, len(means) - 1.0)


def _interval(value: float, spread: Spread, parts: Sequence[Part], level: float) -> tuple[float, float]:
    """Student's interval, with what questions leave room for that are of another matter than those asked."""
    reach = sum(part.reach for part in parts)
    by_error = [float(stats.t.ppf((1 + level) / 2, each.df)) * each.error for each in _spreads(spread, parts)]
    half = max(*by_error, unseen_share(level, parts))
    return max(value - half, -reach), min(value + half, reach)


def _two_sided(value: float, spread: Spread, parts: Sequence[Part]) -> float:
    """The level, from 1 down, at which `_interval` ends at 0."""
    by_error = [2 * float(stats.t.sf(abs(value) / each.error, each.df)) for each in _spreads(spread, parts)]
    return max(*by_error, _level_of_unseen(abs(value), parts))


def _spreads(spread: Spread, parts: Sequence[Part]) -> list[Spread]:
    """That as it is, where it is one, and with unseen questions: the wider of both counts."""
    return [each for each in (spread, _with_unseen(spread, parts)) if each.error > 0]


def _with_unseen(spread: Spread, parts: Sequence[Part]) -> Spread:
    r"""A standard error with two more questions in every part, answered right by one recipe alone, one by each.

    What nearly all questions agree on has nearly no error, which is too little: few questions of another matter may
    have been missed. With `n` questions in a part:
        error ** 2 + sum(2 (reach / n) ** 2)
    The second is a constant, so the degrees of freedom (Satterthwaite) grow with its share. With few seeds that alone
    would make an interval narrower: whoever uses it takes the wider of both.

    Source: after Agresti and Coull 1998, The American Statistician 52:119, who add such cases to a share.
    """
    known = sum(2 * (part.reach / part.questions) ** 2 for part in parts)
    total = spread.error**2 + known
    df = total**2 * spread.df / spread.error**4 if spread.error**4 > 0 else math.inf
    return Spread(math.sqrt(total), df)


def unseen_share(level: float, parts: Sequence[Part]) -> float:
    """How far questions of which none was seen may move the mean, two-sided: no interval at this level is narrower."""
    return _unseen_share(math.log((1 - level) / 2), parts)


def _unseen_share(log_level: float, parts: Sequence[Part]) -> float:
    """How far questions may move the mean of which none was seen, at a level on either side (Clopper-Pearson).

    If none of `n` questions is of another matter, their share is at most `1 - level ** (1 / n)`.
    """
    return -sum(part.reach * math.expm1(log_level / part.questions) for part in parts)


def _level_of_unseen(value: float, parts: Sequence[Part]) -> float:
    """Two times the level at which `_unseen_share` is `value`, which is at least 0; at most 1."""
    low = -800.0 * max(part.questions for part in parts)  # where exp gives 0
    if _unseen_share(low, parts) <= value:
        return 0.0
    log_level = float(optimize.brentq(lambda each: _unseen_share(each, parts) - value, low, 0.0)) if value else 0.0
    return min(1.0, 2 * math.exp(log_level))


def t_interval(
    values: np.ndarray, least: float = -math.inf, most: float = math.inf, level: float = LEVEL
) -> tuple[float, float]:
    """Student's interval of the mean, within `least` and `most`; a point where all values are equal, or one only."""
    mean = float(values.mean())
    error = float(stats.sem(values)) if len(values) > 1 else 0.0
    if not error > 0:  # also where the values differ by too little for a square
        return mean, mean
    low, high = stats.t.interval(level, len(values) - 1, loc=mean, scale=error)
    return max(float(low), least), min(float(high), most)

"""Differences between two recipes that answered the same questions: mean, confidence interval, verdict. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Accuracy of a recipe minus that of the reference, on the same questions with the same seeds."""

    value: float  # mean over seeds and questions
    # For other seeds and other questions. The confidence is 95 % for all recipes of a table together (Bonferroni).
    # None with one seed or one question.
    interval: tuple[float, float] | None
    verdict: str  # see `verdict_of`
    seeds: int  # number of seeds


def paired_difference(
    marks: np.ndarray,
    reference: np.ndarray,
    comparisons: int = 1,
    questions_by_task: Sequence[int] | None = None,
) -> Difference:
    """Compare a recipe with the reference.

    Args:
        marks: of the recipe, `(seeds, questions)`: 1 for a correct answer, 0 for a wrong one.
        reference: of the reference, with the same seeds and questions.
        comparisons: number of recipes compared with the reference; the interval holds for all of them together.
        questions_by_task: number of questions of each task, if the columns are those of several tasks that weigh
            equally. In this case the marks of a task with `n` of all `Q` questions are multiplied by `Q / (tasks * n)`.
    """
    values = marks.astype(float) - reference
    value = float(values.mean())
    if min(values.shape) < 2:
        only = "one seed" if len(values) < 2 else "one question"
        return Difference(value, None, f"{only}: no verdict", len(values))
    interval = _interval(
        value, two_way_error(values), questions_by_task or [values.shape[1]], 1 - (1 - LEVEL) / comparisons
    )
    return Difference(value, interval, verdict_of(value, interval), len(values))


def interval_over_questions(marks: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean difference for other questions, answered by the same models.

    Args:
        marks: `(questions,)`, 1 for a correct answer, 0 for a wrong one.
        reference: of the reference, the same questions.
    """
    values = marks.astype(float) - reference
    error = float(stats.sem(values)) if np.ptp(values) > 0 else 0.0
    return _interval(float(values.mean()), StandardError(error, len(values) - 1.0), [len(values)], LEVEL)


def verdict_of(value: float, interval: tuple[float, float]) -> str:
    """Say "better" or "worse" if the interval excludes 0, else how large a difference it leaves possible.

    "no difference above 4.2 points" is a result: larger differences do not fit the answers. The bound is rounded up.
    """
    low, high = interval
    if low > 0 or high < 0:
        return "better" if value > 0 else "worse"
    bound = math.ceil(round(1000 * max(-low, high), 9)) / 10
    return f"no difference above {bound:.1f} points"


class StandardError(NamedTuple):
    """Standard error of a mean."""

    error: float
    df: float  # degrees of freedom


def two_way_error(values: np.ndarray) -> StandardError:
    r"""Standard error of the mean of values by seed and question, for other seeds and other questions.

    Seeds and questions both count as drawn at random, and every seed answers every question (a crossed design). With
    the mean squares of the two-way table without repetition, `S` seeds and `Q` questions:
        Var(mean) = (MS_seeds + MS_questions - MS_rest) / (S Q)
    but at least `MS_seeds / (S Q)` and `MS_questions / (S Q)`. Degrees of freedom after Satterthwaite, of the same sum.

    Args:
        values: `(S, Q)`, at least two of each.

    Source: Satterthwaite 1946, Biometrics Bulletin 2:110; Searle, Casella, McCulloch 1992, Variance Components, 4.
    """
    num_seeds, num_questions = values.shape
    if np.ptp(values) == 0:
        return StandardError(0.0, float(min(num_seeds, num_questions) - 1))
    by_seed, by_question = values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_question + values.mean()
    ms_seeds = num_questions * float(by_seed.var(ddof=1))
    ms_questions = num_seeds * float(by_question.var(ddof=1))
    df_rest = (num_seeds - 1) * (num_questions - 1)
    ms_rest = float((rest**2).sum()) / df_rest
    total = max(ms_seeds + ms_questions - ms_rest, ms_seeds, ms_questions)
    parts = ms_seeds**2 / (num_seeds - 1) + ms_questions**2 / (num_questions - 1) + ms_rest**2 / df_rest
    return StandardError(math.sqrt(total / values.size), max(1.0, total**2 / parts))


def _interval(value: float, spread: StandardError, questions: Sequence[int], level: float) -> tuple[float, float]:
    """Student's interval, widened for kinds of questions that were not asked; within -1 and 1.

    `questions` has the number of questions of each task; the mean of the tasks is what the interval is for.
    """
    errors = [each for each in (spread, _with_added_questions(spread, questions)) if each.error > 0]
    half = max(float(stats.t.ppf((1 + level) / 2, each.df)) * each.error for each in errors)
    # Of a kind of question that none of n questions is of, the share is at most 1 - p ** (1 / n) (Clopper-Pearson).
    log_p = math.log((1 - level) / 2)
    weight = 1 / len(questions)
    unseen = -sum(weight * math.expm1(log_p / count) for count in questions)
    half = max(half, unseen)
    return max(value - half, -1.0), min(value + half, 1.0)


def _with_added_questions(spread: StandardError, questions: Sequence[int]) -> StandardError:
    r"""Add two questions to every task, one that only the recipe answers correctly, one only the reference.

    Without these questions the error is near 0 if nearly all answers agree, although a few questions on which they
    differ may have been missed. With `n` questions in each of `T` tasks:
        error ** 2 + sum(2 / (T n) ** 2)
    The added part is constant, so the degrees of freedom grow with its share (Satterthwaite). With few seeds the
    interval could become narrower by this; `_interval` uses the wider of the two.

    Source: after Agresti and Coull 1998, The American Statistician 52:119, who add such cases to a share.
    """
    weight = 1 / len(questions)
    added = sum(2 * (weight / count) ** 2 for count in questions)
    total = spread.error**2 + added
    df = total**2 * spread.df / spread.error**4 if spread.error**4 > 0 else math.inf
    return StandardError(math.sqrt(total), df)

"""Differences between two recipes that answered the same questions: mean, confidence interval, verdict. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    value, (seeds, questions) = float(values.mean()), values.shape
    if min(seeds, questions) < 2:
        return Difference(value, None, f"one {'seed' if seeds < 2 else 'question'}: no verdict", seeds)
    level = 1 - (1 - LEVEL) / comparisons
    interval = _interval(value, *two_way_error(values), questions_by_task or [questions], level)
    return Difference(value, interval, verdict_of(value, interval), seeds)


def interval_over_questions(marks: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean difference for other questions, answered by the same models.

    Args:
        marks: `(questions,)`, 1 for a correct answer, 0 for a wrong one.
        reference: of the reference, the same questions.
    """
    values = marks.astype(float) - reference
    error = float(stats.sem(values)) if np.ptp(values) > 0 else 0.0
    return _interval(float(values.mean()), error, len(values) - 1.0, [len(values)], LEVEL)


def verdict_of(value: float, interval: tuple[float, float]) -> str:
    """Say "better" or "worse" if the interval excludes 0, else how large a difference it leaves possible.

    "no difference above 4.2 points" is a result: larger differences do not fit the answers. The bound is rounded up.
    """
    low, high = interval
    if low > 0 or high < 0:
        return "better" if value > 0 else "worse"
    bound = math.ceil(round(1000 * max(-low, high), 9)) / 10
    return f"no difference above {bound:.1f} points"


def two_way_error(values: np.ndarray) -> tuple[float, float]:
    r"""Standard error of the mean of values by seed and question, for other seeds and other questions.

    Seeds and questions both count as drawn at random, and every seed answers every question (a crossed design). With
    the mean squares of the two-way table without repetition, `S` seeds and `Q` questions:
        Var(mean) = (MS_seeds + MS_questions - MS_rest) / (S Q)
    but at least `MS_seeds / (S Q)` and `MS_questions / (S Q)`. Degrees of freedom after Satterthwaite, of the same sum.

    Args:
        values: `(S, Q)`, at least two of each.

    Returns:
        The standard error, and its degrees of freedom.

    Source: Satterthwaite 1946, Biometrics Bulletin 2:110; Searle, Casella, McCulloch 1992, Variance Components, 4.
    """
    num_seeds, num_questions = values.shape
    if np.ptp(values) == 0:
        return 0.0, float(min(num_seeds, num_questions) - 1)
    by_seed, by_question = values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_question + values.mean()
    ms_seeds = num_questions * float(by_seed.var(ddof=1))
    ms_questions = num_seeds * float(by_question.var(ddof=1))
    df_rest = (num_seeds - 1) * (num_questions - 1)
    ms_rest = float((rest**2).sum()) / df_rest
    total = max(ms_seeds + ms_questions - ms_rest, ms_seeds, ms_questions)
    parts = ms_seeds**2 / (num_seeds - 1) + ms_questions**2 / (num_questions - 1) + ms_rest**2 / df_rest
    return math.sqrt(total / values.size), max(1.0, total**2 / parts)


def _interval(
    value: float, error: float, df: float, questions_by_task: Sequence[int], level: float
) -> tuple[float, float]:
    r"""Student's interval of the mean over equally weighted tasks, within -1 and 1.

    It is widened for questions on which recipe and reference differ and which were not asked. If nearly all answers
    agree, the standard error is near 0 although such questions may exist. Three half widths are computed, and the
    widest is used. With `n` questions in each of `T` tasks:
        1. t(df) error
        2. t(df') error', as if every task had two more questions, one that only the recipe answers correctly and one
           that only the reference does: error' ** 2 = error ** 2 + sum(2 / (T n) ** 2). The added part is constant, so
           df' = error' ** 4 df / error ** 4 (Satterthwaite). With few seeds this alone could be narrower than 1.
        3. sum((1 - p ** (1 / n)) / T), p = (1 - level) / 2: the largest share of a kind of question that none of the
           asked ones is of (Clopper-Pearson).

    Source of 2: after Agresti and Coull 1998, The American Statistician 52:119, who add such cases to a share.
    """
    weight = 1 / len(questions_by_task)
    total = error**2 + sum(2 * (weight / count) ** 2 for count in questions_by_task)
    widened = math.sqrt(total), total**2 * df / error**4 if error**4 > 0 else math.inf
    spreads = [each for each in ((error, df), widened) if each[0] > 0]
    half = max(float(stats.t.ppf((1 + level) / 2, freedom)) * spread for spread, freedom in spreads)
    log_p = math.log((1 - level) / 2)
    half = max(half, -sum(weight * math.expm1(log_p / count) for count in questions_by_task))
    return max(value - half, -1.0), min(value + half, 1.0)

"""Differences between two recipes that were tested on the same questions: mean, confidence interval, verdict. No torch.

The outcome is the accuracy, or for free text the loss. Below, a question is a row of the test data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
MORE_QUESTIONS = 4


def more_seeds(seeds: int) -> int:
    """Number of seeds of a larger study: twice the number, and at least 5."""
    return max(5, 2 * seeds)


@dataclass(frozen=True)
class Difference:
    """Outcome of a recipe minus that of the reference, on the same questions with the same seeds."""

    value: float  # mean over seeds and questions: a share of the answers, or nats per token
    # For other seeds and other questions. The confidence is 95 % for all recipes of a table together (Bonferroni).
    # None with one seed or one question.
    interval: tuple[float, float] | None
    verdict: str  # see `verdict_of` and `loss_verdict_of`
    seeds: int  # number of seeds
    # Half of the interval that a larger study can expect; None if there is no interval.
    with_more_seeds: float | None = None  # with the number of seeds after `more_seeds`
    with_more_questions: float | None = None  # with `MORE_QUESTIONS` times the questions


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
    counts, level = questions_by_task or [questions], _joint_level(comparisons)
    sizes = counts, counts, [MORE_QUESTIONS * count for count in counts]
    half, *larger = (_half_width(*error, each, level) for error, each in zip(_errors(values), sizes, strict=True))
    interval = _within_shares(value, half)
    return Difference(value, interval, verdict_of(value, interval), seeds, *larger)


def paired_loss_difference(
    losses: np.ndarray, reference: np.ndarray, tokens: np.ndarray, comparisons: int = 1
) -> Difference:
    """Compare the loss of a recipe with that of the reference, in nats per token. A negative difference is better.

    The interval is Student's, with the error and degrees of freedom of `two_way_error` for `loss_values`.

    Args:
        losses: of the recipe, `(seeds, rows)`: loss in nats, summed over the tokens of a row.
        reference: of the reference, with the same seeds and rows.
        tokens: `(rows,)`: number of tokens that contribute to the loss of a row.
        comparisons: number of recipes compared with the reference; the interval holds for all of them together.
    """
    values = loss_values(losses, reference, tokens)
    value, (seeds, rows) = float(values.mean()), values.shape
    if min(seeds, rows) < 2:
        return Difference(value, None, f"one {'seed' if seeds < 2 else 'row'}: no verdict", seeds)
    quantile = (1 + _joint_level(comparisons)) / 2
    half, *larger = (float(stats.t.ppf(quantile, df)) * error for error, df in _errors(values))
    interval = value - half, value + half
    return Difference(value, interval, loss_verdict_of(value, interval), seeds, *larger)


def loss_values(losses: np.ndarray, reference: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    r"""Values by seed and row whose mean is the difference in loss per token, and whose spread is that of a ratio.

    The loss per token is a ratio of two sums over rows: nats and tokens. With the difference in nats `d_sq` of seed `s`
    and row `q`, and the row's number of tokens `w_q`:
        D = mean(d_sq) / mean(w_q)        v_sq = D + (d_sq - D w_q) / mean(w_q)
    The variance of `D` for other seeds and rows is that of the mean of `v` (the linearised ratio).

    Args:
        losses: of the recipe, `(seeds, rows)`: loss in nats, summed over the tokens of a row.
        reference: of the reference, with the same seeds and rows.
        tokens: `(rows,)`: number of tokens that contribute to the loss of a row.

    Source: Cochran 1977, Sampling Techniques, 3rd edition, 6.3.
    """
    nats, weights = losses - reference, tokens / tokens.mean()
    difference = float(nats.mean() / tokens.mean())
    return difference + nats / tokens.mean() - difference * weights


def interval_over_questions(marks: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean difference for other questions, answered by the same models.

    Args:
        marks: `(questions,)`, 1 for a correct answer, 0 for a wrong one.
        reference: of the reference, the same questions.
    """
    values = marks.astype(float) - reference
    error = float(stats.sem(values)) if np.ptp(values) > 0 else 0.0
    return _within_shares(float(values.mean()), _half_width(error, len(values) - 1.0, [len(values)], LEVEL))


def verdict_of(value: float, interval: tuple[float, float]) -> str:
    """Say "better" or "worse" if the interval excludes 0, else how large a difference it leaves possible.

    "no difference above 4.2 points" is a result: larger differences do not fit the answers. The bound is rounded up.
    """
    low, high = interval
    if low > 0 or high < 0:
        return "better" if value > 0 else "worse"
    bound = math.ceil(round(1000 * max(-low, high), 9)) / 10
    return f"no difference above {bound:.1f} points"


def loss_verdict_of(value: float, interval: tuple[float, float]) -> str:
    """`verdict_of` for differences in loss, where a negative difference is better; the bound is in nats per token."""
    low, high = interval
    if low > 0 or high < 0:
        return "better" if value < 0 else "worse"
    bound = math.ceil(round(1000 * max(-low, high), 9)) / 1000
    return f"no difference above {bound:.3f} nats"


def _joint_level(comparisons: int) -> float:
    """The level of an interval that holds for all of `comparisons` recipes together at `LEVEL` (Bonferroni)."""
    return 1 - (1 - LEVEL) / comparisons


def two_way_error(values: np.ndarray, sizes: tuple[int, int] | None = None) -> tuple[float, float]:
    r"""Standard error of the mean of values by seed and question, for other seeds and other questions.

    Seeds and questions both count as drawn at random, and every seed answers every question (a crossed design). With
    the mean squares of the two-way table without repetition, `S` seeds and `Q` questions:
        Var(mean) = (MS_seeds + MS_questions - MS_rest) / (S Q)
    but at least `MS_seeds / (S Q)` and `MS_questions / (S Q)`. Degrees of freedom after Satterthwaite, of the same sum.

    Args:
        values: `(S, Q)`, at least two of each.
        sizes: numbers of seeds and questions of a larger study, whose error is estimated: the mean squares are those
            that the variance components of `values` predict. None for the study of `values`.

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
    if sizes is not None:
        ms_seeds = ms_rest + max(0.0, ms_seeds - ms_rest) * sizes[1] / num_questions
        ms_questions = ms_rest + max(0.0, ms_questions - ms_rest) * sizes[0] / num_seeds
        num_seeds, num_questions = sizes
        df_rest = (num_seeds - 1) * (num_questions - 1)
    total = max(ms_seeds + ms_questions - ms_rest, ms_seeds, ms_questions)
    parts = ms_seeds**2 / (num_seeds - 1) + ms_questions**2 / (num_questions - 1) + ms_rest**2 / df_rest
    return math.sqrt(total / (num_seeds * num_questions)), max(1.0, total**2 / parts)


def _errors(values: np.ndarray) -> list[tuple[float, float]]:
    """`two_way_error` of a study, and of a study with more seeds and one with more questions."""
    seeds, questions = values.shape
    larger = (more_seeds(seeds), questions), (seeds, MORE_QUESTIONS * questions)
    return [two_way_error(values), *(two_way_error(values, sizes) for sizes in larger)]


def _within_shares(value: float, half: float) -> tuple[float, float]:
    return max(value - half, -1.0), min(value + half, 1.0)


def _half_width(error: float, df: float, questions_by_task: Sequence[int], level: float) -> float:
    r"""Half of Student's interval of the mean over equally weighted tasks.

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
    return max(half, -sum(weight * math.expm1(log_p / count) for count in questions_by_task))

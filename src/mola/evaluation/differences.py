"""Whether answers to the same questions differ: means, intervals, paired differences. Statistics only, no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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

    value: float  # mean difference of the accuracies. Intervals are given as far as they lie between -1 and 1.
    # t interval over seeds: would other seeds say the same, on these questions? None with one seed
    seeds_95: tuple[float, float] | None
    # t interval over questions, each the mean over seeds: would other questions say the same?
    questions_95: tuple[float, float]
    p_questions: float  # paired t test over questions, two-sided; 1 if no answer differs
    p_adjusted: float  # the same, adjusted for the number of recipes compared (Benjamini and Hochberg)
    # `better` or `worse` if both intervals exclude 0 on the same side and `p_adjusted` is below 0.05; `no significant
    # difference` otherwise, also with one seed
    verdict: str
    seeds: int  # number of seeds


def mean_accuracy(accuracies: Sequence[float]) -> Mean:
    """Mean over seeds.

    Args:
        accuracies: one per seed, at least one.
    """
    values = np.asarray(accuracies, dtype=float)
    return Mean(float(values.mean()), t_interval(values, 0.0, 1.0) if len(values) > 1 else None, len(values))


def paired_differences(recipes: dict[str, np.ndarray], reference: np.ndarray) -> dict[str, Difference]:
    """Every recipe against the reference.

    Args:
        recipes: name -> marks `(seeds, questions)`, 0 or 1.
        reference: marks of the reference, with the same seeds and questions.
    """
    found = {name: marks.astype(float) - reference for name, marks in recipes.items()}
    if not found:
        return {}
    raw = [p_value(difference.mean(0)) for difference in found.values()]
    adjusted = stats.false_discovery_control(raw, method="bh")
    return {
        name: _difference(difference, p, float(p_adjusted))
        for (name, difference), p, p_adjusted in zip(found.items(), raw, adjusted, strict=True)
    }


def _difference(difference: np.ndarray, p: float, p_adjusted: float) -> Difference:
    by_seed, by_question = difference.mean(1), difference.mean(0)
    over_seeds = t_interval(by_seed, -1.0, 1.0) if len(by_seed) > 1 else None
    over_questions = t_interval(by_question, -1.0, 1.0)
    value = float(difference.mean())
    is_clear = over_seeds is not None and p_adjusted < 1 - LEVEL and _same_side(over_seeds, over_questions)
    verdict = ("better" if value > 0 else "worse") if is_clear else "no significant difference"
    return Difference(value, over_seeds, over_questions, p, p_adjusted, verdict, len(by_seed))


def _same_side(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return (one[0] > 0 and other[0] > 0) or (one[1] < 0 and other[1] < 0)


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


def p_value(values: np.ndarray) -> float:
    """Of a paired t test of differences, two-sided; 1 if there is none, 0 if all are one other number."""
    if np.ptp(values) == 0:
        return 1.0 if len(values) < 2 or values[0] == 0 else 0.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)

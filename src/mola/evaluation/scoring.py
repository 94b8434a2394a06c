"""Accuracy, its interval and its breakdown by group; statistics only, no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

from mola.errors import MolaError


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Unlike the normal approximation it stays inside [0, 1] and is not empty at 0 or `total` hits.

    Args:
        correct: hits, `0 <= correct <= total`.
        total: trials, at least 1.
        confidence: level, strictly between 0 and 1.

    Returns:
        Lower and upper end, fractions of 1.

    Raises:
        MolaError: a value is outside its range.
    """
    if total < 1:
        raise MolaError(f"`total` must be at least 1 to compute an interval: got {total}. Pass some samples.")
    if not 0 <= correct <= total:
        raise MolaError(f"`correct` must lie between 0 and `total`: got {correct} of {total}.")
    if not 0 < confidence < 1:
        raise MolaError(f"`confidence` must lie between 0 and 1: got {confidence}. Pass 0.95 for 95 %.")
    interval = binomtest(correct, total).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_summary(correct: int, total: int) -> dict[str, Any]:
    """Accuracy with its 95 % interval as the result files write it.

    Args:
        correct: hits.
        total: samples, at least 1.

    Returns:
        `{"accuracy": fraction, "correct": int, "total": int, "interval_95": [low, high]}`.

    Raises:
        MolaError: `total` is 0 or `correct` is not between 0 and `total`.
    """
    interval = wilson_interval(correct, total)
    return {
        "accuracy": correct / total,
        "correct": int(correct),
        "total": int(total),
        "interval_95": list(interval),
    }


def accuracy_by_group(
    rows: Sequence[Mapping[str, Any]], correct: Iterable[bool], columns: Iterable[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy for every value of every group column.

    Args:
        rows: samples; a missing or None value counts under `"(none)"`.
        correct: one boolean per row.
        columns: names of the group columns, such as `subject` and `grade`.

    Returns:
        `{column: {value as text: accuracy_summary}}`, values sorted; the totals of a column add up to
        the number of rows. A column in which no row has a value is left out.

    Raises:
        MolaError: the lengths differ.
    """
    marks = [bool(mark) for mark in correct]
    if len(marks) != len(rows):
        raise MolaError(
            f"`correct` needs one entry per row: got {len(marks)} entries for {len(rows)} rows. "
            "Pass one boolean for each row."
        )
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        if all(value is None for value in values):
            continue
        counts: dict[str, list[int]] = {}
        for value, mark in zip(values, marks, strict=True):
            count = counts.setdefault("(none)" if value is None else str(value), [0, 0])
            count[0] += mark
            count[1] += 1
        groups[column] = {value: accuracy_summary(*counts[value]) for value in sorted(counts)}
    return groups

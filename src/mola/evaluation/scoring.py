"""Accuracy and loss with their intervals, accuracy by group, F1, Matthews correlation; statistics only, no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_MIN_SAMPLES = 20  # a model that discriminates hardly gives 20 samples the same answer by chance
_DRAWS = 2000  # of the bootstrap


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion.

    Unlike the normal approximation it stays inside [0, 1] and is not empty at 0 or `total` hits.

    Args:
        correct: hits, `0 <= correct <= total`.
        total: trials, at least 1.

    Returns:
        Lower and upper end, as fractions.
    """
    from scipy.stats import binomtest  # takes a second

    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_summary(correct: int, total: int) -> dict[str, Any]:
    """Accuracy over at least one sample with its 95 % interval, as in the result files.

    Returns:
        `{"accuracy": fraction, "correct": int, "total": int, "interval_95": [low, high]}`.
    """
    interval = list(wilson_interval(correct, total))
    return {"accuracy": correct / total, "correct": int(correct), "total": int(total), "interval_95": interval}


def constant_prediction(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The answer of a model that gives every sample the same one, though their correct answers differ.

    The accuracy of such a model only reflects how common its answer is in the data.

    Args:
        samples: with `predicted` and `answer`, as the result files have them.

    Returns:
        The answer; None if there are several, fewer than 20 samples, or samples that got none.
    """
    given, correct = ({sample[name] for sample in samples} for name in ("predicted", "answer"))
    return given.pop() if len(samples) >= _MIN_SAMPLES and len(given) == 1 < len(correct) else None


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
    """
    is_correct = [bool(each) for each in correct]
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        if all(value is None for value in values):
            continue
        counts: dict[str, list[int]] = {}
        for value, right in zip(values, is_correct, strict=True):
            count = counts.setdefault("(none)" if value is None else str(value), [0, 0])
            count[0] += right
            count[1] += 1
        groups[column] = {value: accuracy_summary(*counts[value]) for value in sorted(counts)}
    return groups


class BinaryCounts(NamedTuple):
    """How often each answer to a question with two labels occurs."""

    true_positive: int  # positive, and predicted to be positive
    false_positive: int  # negative, but predicted to be positive
    false_negative: int  # positive, but predicted to be negative
    true_negative: int  # negative, and predicted to be negative


def binary_counts(answers: Sequence[str], predicted: Sequence[str | None], labels: tuple[str, str]) -> BinaryCounts:
    """Count correct and wrong predictions of each of two labels.

    An unanswered sample counts as if the wrong label had been predicted, so the correct predictions are the same
    samples as for accuracy.

    Args:
        answers: correct label of each sample.
        predicted: predicted label of each sample; None for unanswered.
        labels: the negative and the positive label.

    Returns:
        The four counts, which add up to the number of samples.
    """
    right, wrong = [0, 0], [0, 0]
    for answer, label in zip(answers, predicted, strict=True):
        counts = right if label == answer else wrong
        counts[labels.index(answer)] += 1
    return BinaryCounts(right[1], wrong[0], wrong[1], right[0])


def f1_score(counts: BinaryCounts) -> float:
    r"""F1 of the positive label: the harmonic mean of precision and recall.

    With ``TP``, ``FP``, ``FN`` = true positives, false positives, false negatives:
        F1 = 2 TP / (2 TP + FP + FN)

    Returns:
        0 to 1; 0 if F1 is undefined, because no sample is positive and none is predicted to be.

    Source: van Rijsbergen 1979, Information Retrieval, chapter 7 (as ``1 - E``).
    """
    wrong = counts.false_positive + counts.false_negative
    total = 2 * counts.true_positive + wrong
    return 2 * counts.true_positive / total if total else 0.0


def matthews_correlation(counts: BinaryCounts) -> float:
    r"""Matthews correlation: how well predictions correlate with answers, however frequent each label is.

    With ``TP``, ``FP``, ``FN``, ``TN`` = the four counts:
        MCC = (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))

    Returns:
        -1 (always the wrong label) to 1 (always correct); 0 if undefined, because the answers or the predictions
        have only one label.

    Source: Matthews 1975, Biochimica et Biophysica Acta 405:442.
    """
    tp, fp, fn, tn = counts
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def binary_metrics(
    names: Iterable[str], answers: Sequence[str], predicted: Sequence[str | None], labels: tuple[str, str]
) -> dict[str, float]:
    """The metrics `names` (`f1`, `matthews`) of a task with two labels; other arguments as for `binary_counts`."""
    functions = {"f1": f1_score, "matthews": matthews_correlation}
    counts = binary_counts(answers, predicted, labels)
    return {name: functions[name](counts) for name in names}


def summarize_losses(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`loss`, `perplexity`, `loss_per_byte`, `interval_95`, `tokens`, `bytes` and `total` of `LossResult.samples`."""
    losses, tokens, sizes = ([sample[name] for sample in samples] for name in ("loss", "tokens", "bytes"))
    loss = math.fsum(losses) / sum(tokens)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "loss_per_byte": math.fsum(losses) / sum(sizes) if any(sizes) else None,
        "interval_95": loss_interval(losses, tokens),
        "tokens": sum(tokens),
        "bytes": sum(sizes),
        "total": len(samples),
    }


def perplexity(loss: float) -> float:
    """`exp(loss)` of a loss in nats; infinite above 709 nats, where it is larger than every float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def loss_interval(losses: Sequence[float], tokens: Sequence[int]) -> list[float] | None:
    r"""95 % interval of `\sum_i L_i / \sum_i T_i` for other rows: 2.5 % and 97.5 % quantile of a bootstrap over rows.

    Each of 2,000 draws has as many rows as the data. The seed is fixed, so equal rows give equal intervals.

    Args:
        losses: sum of the loss of each row.
        tokens: number of trained tokens of each row.

    Returns:
        Lower and upper end; None for a single row.

    Source: Efron 1979, Annals of Statistics 7:1.
    """
    if len(losses) < 2:
        return None
    # With numpy alone: to import scipy takes a second, which a report has not.
    rows = np.array([losses, tokens], dtype=float)
    generator = np.random.default_rng(0)
    draws = (generator.integers(len(losses), size=len(losses)) for _ in range(_DRAWS))
    sums = np.array([rows[:, draw].sum(axis=1) for draw in draws])
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return [float(low), float(high)]

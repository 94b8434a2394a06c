import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola.evaluation.scoring import (
    BinaryCounts,
    accuracy_by_group,
    accuracy_summary,
    binary_counts,
    binary_metrics,
    f1_score,
    matthews_correlation,
    wilson_interval,
)


def test_wilson_interval_of_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263, 95 %.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_accuracy_summary_fields():
    summary = accuracy_summary(3, 4)
    assert {key: summary[key] for key in ("accuracy", "correct", "total")} == {
        "accuracy": 0.75,
        "correct": 3,
        "total": 4,
    }
    assert summary["interval_95"] == list(wilson_interval(3, 4))


def test_accuracy_by_group_counts_values_and_rows_without_one():
    rows = [
        {"subject": "physics", "grade": 3},
        {"subject": "physics", "grade": 4},
        {"grade": 3},
        {"subject": None},
    ]
    groups = accuracy_by_group(rows, [True, False, True, False], ["subject", "grade", "absent"])
    assert list(groups) == ["subject", "grade"]
    assert {value: (row["correct"], row["total"]) for value, row in groups["subject"].items()} == {
        "physics": (1, 2),
        "(none)": (1, 2),
    }
    assert list(groups["grade"]) == ["(none)", "3", "4"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1))
def test_accuracy_by_group_totals_add_up(pairs):
    marks = [mark for _, mark in pairs]
    values = accuracy_by_group([{"g": value} for value, _ in pairs], marks, ["g"])["g"].values()
    assert sum(row["total"] for row in values) == len(pairs)
    assert sum(row["correct"] for row in values) == sum(marks)


LABELS = ("No", "Yes")
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])), min_size=1)


def test_binary_metrics_of_a_hand_computed_table():
    # 4 of 6 positives found, one miss being unanswered; 3 of 4 negatives found.
    answers = ["Yes"] * 6 + ["No"] * 4
    predicted = ["Yes", "Yes", "Yes", "Yes", "No", None, "No", "No", "No", "Yes"]
    assert binary_counts(answers, predicted, LABELS) == BinaryCounts(4, 1, 2, 3)
    metrics = binary_metrics(["f1", "matthews"], answers, predicted, LABELS)
    assert metrics == pytest.approx({"f1": 8 / 11, "matthews": 10 / math.sqrt(600)}, rel=1e-12)


@pytest.mark.parametrize(
    ("counts", "f1", "matthews"),
    [
        ((3, 0, 0, 5), 1.0, 1.0),
        ((0, 3, 5, 0), 0.0, -1.0),
        ((2, 2, 2, 2), 0.5, 0.0),
        ((6, 2, 0, 0), 12 / 14, 0.0),  # only "positive" is ever predicted
        ((0, 0, 0, 4), 0.0, 0.0),  # no positive at all: neither is defined
        ((90, 4, 1, 5), 180 / 185, (450 - 4) / math.sqrt(94 * 91 * 9 * 6)),
    ],
)
def test_f1_and_matthews_of_counts(counts, f1, matthews):
    assert f1_score(BinaryCounts(*counts)) == pytest.approx(f1, rel=1e-12)
    assert matthews_correlation(BinaryCounts(*counts)) == pytest.approx(matthews, rel=1e-12)


@given(PAIRS)
def test_unanswered_counts_as_the_wrong_label(pairs):
    answers = [answer for answer, _ in pairs]
    predicted = [label for _, label in pairs]
    other = {"No": "Yes", "Yes": "No"}
    filled = [other[answer] if label is None else label for answer, label in pairs]
    counts = binary_counts(answers, predicted, LABELS)
    assert counts == binary_counts(answers, filled, LABELS)
    assert sum(counts) == len(pairs)
    assert counts.true_positive + counts.true_negative == sum(answer == label for answer, label in pairs)


@given(st.tuples(*[st.integers(0, 10**6)] * 4))
def test_matthews_of_large_counts_is_bounded(counts):
    tp, fp, fn, tn = counts
    value = matthews_correlation(BinaryCounts(*counts))
    assert -1 <= value <= 1
    assert matthews_correlation(BinaryCounts(tn, fn, fp, tp)) == value
    assert matthews_correlation(BinaryCounts(fp, tp, tn, fn)) == -value  # every prediction turned round


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2))
def test_matthews_is_the_correlation_of_zeros_and_ones(pairs):
    answers, predicted = ([int(pair[i]) for pair in pairs] for i in (0, 1))
    counts = binary_counts([LABELS[i] for i in answers], [LABELS[i] for i in predicted], LABELS)
    constant = len(set(answers)) == 1 or len(set(predicted)) == 1
    expected = 0.0 if constant else statistics.correlation(answers, predicted)
    assert matthews_correlation(counts) == pytest.approx(expected, abs=1e-9)


@given(PAIRS)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs):
    counts = binary_counts([answer for answer, _ in pairs], [label for _, label in pairs], LABELS)
    if counts.true_positive == 0:
        assert f1_score(counts) == 0
        return
    precision = counts.true_positive / (counts.true_positive + counts.false_positive)
    recall = counts.true_positive / (counts.true_positive + counts.false_negative)
    assert f1_score(counts) == pytest.approx(statistics.harmonic_mean([precision, recall]), rel=1e-12)

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola.errors import MolaError
from mola.evaluation.scoring import accuracy_by_group, accuracy_summary, wilson_interval


def test_wilson_interval_of_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263, 95 %.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_interval_solves_its_equation(counts, confidence):
    correct, total = counts
    low, high = wilson_interval(correct, total, confidence)
    share = correct / total
    assert -1e-12 <= low <= share + 1e-12 <= high + 2e-12 <= 1 + 3e-12
    assert low < high
    # The ends are where the score statistic equals the same quantile; ends at 0 and 1 are exact.
    statistics = [(share - end) / math.sqrt(end * (1 - end) / total) for end in (low, high) if 1e-9 < end < 1 - 1e-9]
    magnitudes = [abs(value) for value in statistics]
    assert max(magnitudes) == pytest.approx(min(magnitudes), rel=1e-4)


def test_wilson_interval_narrows_with_samples_and_widens_with_confidence():
    def width(*arguments):
        low, high = wilson_interval(*arguments)
        return high - low

    assert width(500, 1000) < width(50, 100)
    assert width(50, 100, 0.99) > width(50, 100, 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "got 0"),
        ((5, 4), "5 of 4"),
        ((-1, 4), "-1 of 4"),
        ((1, 4, 1.0), "got 1.0"),
        ((1, 4, 95), "95"),
    ],
)
def test_wilson_interval_refuses_impossible_values(arguments, message):
    with pytest.raises(MolaError, match=message):
        wilson_interval(*arguments)


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


def test_accuracy_by_group_refuses_other_lengths():
    with pytest.raises(MolaError, match="got 1 entries for 2 rows"):
        accuracy_by_group([{}, {}], [True], [])

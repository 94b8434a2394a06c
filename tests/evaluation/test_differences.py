"""Paired differences: intervals for other seeds and other questions, verdicts."""

import numpy as np
import pytest
from scipy import stats

from mola.evaluation.differences import interval_over_questions, paired_difference, two_way_error, verdict_of
from tests.grids import slow


def test_value_is_the_difference_of_the_accuracies():
    reference = np.array([[1, 0, 1, 0], [1, 0, 0, 0]])
    assert paired_difference(reference, reference).value == 0
    assert paired_difference(np.ones((2, 4)), reference).value == pytest.approx(0.625)


def test_two_way_error_computed_by_hand():
    # Means of rows 1, 3; of columns 1, 2, 3; of all 2. The rest is -+1, 0, +-1, so the mean squares are 6, 2, 2.
    error, df = two_way_error(np.array([[1.0, 1.0, 1.0], [1.0, 3.0, 5.0]]))
    assert error == pytest.approx((6 / 6) ** 0.5)
    assert df == 1  # 36 / (36 / 1 + 4 / 2 + 4 / 2), and at least 1


def test_equal_answers_leave_room_for_other_questions():
    """Of 200 questions none differs, so a share of 1.8 % may (exact binomial interval)."""
    right = np.ones((5, 200))
    found = paired_difference(right, right)
    bound = stats.binomtest(0, 200).proportion_ci(0.95, method="exact").high
    assert found.interval == pytest.approx((-bound, bound))
    assert interval_over_questions(right[0], right[0]) == pytest.approx((-bound, bound))
    assert found.verdict == "no difference above 1.9 points"  # rounded up
    assert paired_difference(right, right, comparisons=10).interval[1] > bound


def test_few_different_answers_give_no_narrower_interval_than_none():
    right, bounds = np.ones((10, 200)), []
    for wrong in (0, 1, 2, 4, 8):
        marks = right.copy()
        marks[0, :wrong] = 0
        bounds.append(max(map(abs, paired_difference(marks, right, 13).interval)))
    assert 0.03 < bounds[0] < 0.032
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.04


@pytest.mark.parametrize(("hard", "slip"), [(0.01, 0.0002), *slow((0.01, 0.005), (0.04, 0.01))])
def test_interval_holds_the_true_difference_where_nearly_all_answers_are_right(hard, slip):
    """One recipe never answers a few of the questions; both are wrong now and then."""
    generator, rounds, hits = np.random.default_rng(2), 300, 0
    for _ in range(rounds):
        other = (generator.random(200) >= hard) * (generator.random((10, 200)) >= slip)
        one = np.float64(generator.random((10, 200)) >= slip)
        low, high = paired_difference(np.float64(other), one).interval
        hits += low <= -hard * (1 - slip) <= high
    assert hits >= 0.94 * rounds


@pytest.mark.parametrize("comparisons", [1, 12])
def test_added_questions_make_no_interval_narrower(comparisons):
    """With few seeds they raise the degrees of freedom by more than the error."""
    one, other = np.ones((4, 200)), np.ones((4, 200))
    for seed, (start, end) in enumerate([(0, 4), (4, 8), (8, 12), (12, 24)]):
        other[seed, start:end] = 0
    found = paired_difference(other, one, comparisons)
    error, df = two_way_error(other - one)
    assert found.interval[1] - found.value >= stats.t.ppf(1 - 0.05 / comparisons / 2, df) * error * (1 - 1e-9)


def test_mean_of_tasks_has_the_mean_of_their_bounds_where_no_answer_differs():
    marks = np.ones((4, 1020))
    bounds = [paired_difference(marks[:, :size], marks[:, :size]).interval[1] for size in (20, 1000)]
    assert paired_difference(marks, marks, questions_by_task=[20, 1000]).interval[1] == pytest.approx(sum(bounds) / 2)


def test_interval_is_for_other_seeds_and_other_questions():
    """Differences vary between seeds and between questions: about 95 % of the intervals hold the true one, 0."""
    generator = np.random.default_rng(1)
    rounds, hits = 400, 0
    for _ in range(rounds):
        chance = 0.5 + 0.1 * generator.normal(size=(6, 1)) + 0.2 * generator.normal(size=(1, 40))
        one, other = (np.float64(generator.random((6, 40)) < chance) for _ in range(2))
        other = np.where(generator.random((1, 40)) < 0.3, 1 - other, other)  # some questions are of another kind
        low, high = paired_difference(other, one).interval
        hits += low <= 0 <= high
    assert 0.93 * rounds <= hits <= 0.995 * rounds


def test_clear_differences_have_a_verdict():
    generator = np.random.default_rng(0)
    weak, strong = (np.float64(generator.random((5, 400)) < share) for share in (0.4, 0.7))
    assert paired_difference(strong, weak).verdict == "better"
    assert paired_difference(weak, strong).verdict == "worse"


def test_equal_recipes_rarely_have_a_verdict():
    """At most 5 % of the studies may say of any recipe that it is better or worse."""
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        chance = generator.random(100)  # some questions are easy, some are hard
        one, *others = (np.float64(generator.random((3, 100)) < chance) for _ in range(5))
        wrong += any(paired_difference(other, one, 4).verdict in ("better", "worse") for other in others)
    assert wrong <= 10


def test_verdict_names_the_bound():
    assert verdict_of(0.01, (0.001, 0.02)) == "better"
    assert verdict_of(-0.01, (-0.02, -0.001)) == "worse"
    assert verdict_of(0.01, (-0.031, 0.05)) == "no difference above 5.0 points"
    assert verdict_of(-0.01, (-0.031, 0.02)) == "no difference above 3.1 points"
    assert verdict_of(0.01, (-0.01, 0.04201)) == "no difference above 4.3 points"  # rounded up


def test_one_seed_or_one_question_has_no_verdict():
    found = paired_difference(np.ones((1, 50)), np.zeros((1, 50)))
    assert (found.verdict, found.interval, found.value) == ("one seed: no verdict", None, 1.0)
    assert paired_difference(np.ones((3, 1)), np.zeros((3, 1))).verdict == "one question: no verdict"

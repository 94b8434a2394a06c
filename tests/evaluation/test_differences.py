"""Paired differences: intervals for other seeds and other questions, verdicts."""

import numpy as np
import pytest
from scipy import stats

from mola.evaluation.differences import (
    interval_over_questions,
    loss_values,
    loss_verdict_of,
    paired_difference,
    paired_loss_difference,
    two_way_error,
    verdict_of,
)
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


# ---------------------------------------------------------------------- loss


def drawn_losses(generator, seeds, rows, spread_of_seeds=0.0, effect=0.0):
    """Losses of a recipe and of the reference, which differ by seed, by row and by chance; tokens of the rows."""
    tokens = np.maximum(1, generator.lognormal(3, 0.8, rows).round())
    reference = (2 + generator.normal(size=(seeds, rows)) * 0.1) * tokens
    by_seed, by_row = generator.normal(size=(seeds, 1)) * spread_of_seeds, generator.normal(size=rows) * 0.1
    return (
        reference + (effect + by_seed + by_row + generator.normal(size=(seeds, rows)) * 0.1) * tokens,
        reference,
        tokens,
    )


def test_difference_in_loss_is_that_of_all_tokens_together():
    """A row with more tokens weighs more; the same as the difference of the two losses per token."""
    losses, reference, tokens = drawn_losses(np.random.default_rng(0), 3, 40)
    found = paired_loss_difference(losses, reference, tokens)
    per_token = [sum(map(sum, each)) / (3 * sum(tokens)) for each in (losses, reference)]
    assert found.value == pytest.approx(per_token[0] - per_token[1])
    assert found.value != pytest.approx(((losses - reference) / tokens).mean())


def test_error_of_the_loss_is_that_of_the_crossed_table_computed_one_by_one():
    losses, reference, tokens = drawn_losses(np.random.default_rng(1), 3, 7, spread_of_seeds=0.05)
    seeds, rows = losses.shape
    difference = sum(losses[s][q] - reference[s][q] for s in range(seeds) for q in range(rows)) / (seeds * sum(tokens))
    mean_tokens = sum(tokens) / rows
    rest = [
        [(losses[s][q] - reference[s][q] - difference * tokens[q]) / mean_tokens for q in range(rows)]
        for s in range(seeds)
    ]
    by_seed = [sum(rest[s]) / rows for s in range(seeds)]
    by_row = [sum(rest[s][q] for s in range(seeds)) / seeds for q in range(rows)]
    ms_seeds = rows * sum(each**2 for each in by_seed) / (seeds - 1)
    ms_rows = seeds * sum(each**2 for each in by_row) / (rows - 1)
    left = sum((rest[s][q] - by_seed[s] - by_row[q]) ** 2 for s in range(seeds) for q in range(rows))
    ms_rest = left / ((seeds - 1) * (rows - 1))
    total = max(ms_seeds + ms_rows - ms_rest, ms_seeds, ms_rows)
    error, _ = two_way_error(loss_values(losses, reference, tokens))
    assert error == pytest.approx((total / (seeds * rows)) ** 0.5)


def test_error_over_rows_is_that_of_a_bootstrap():
    """Seeds do not differ: rows are drawn again, with their tokens, and the ratio is computed anew."""
    generator = np.random.default_rng(2)
    losses, reference, tokens = drawn_losses(generator, 1, 200, effect=0.3)
    nats = (losses - reference)[0]
    drawn = generator.integers(0, 200, (4000, 200))
    ratios = nats[drawn].sum(1) / tokens[drawn].sum(1)
    error, _ = two_way_error(np.repeat(loss_values(losses, reference, tokens), 2, axis=0))
    assert error == pytest.approx(ratios.std(), rel=0.1)


@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.0), (3, 0.02), *slow((2, 0.02), (5, 0.05))])
def test_interval_of_the_loss_holds_the_true_difference(seeds, spread):
    generator, rounds, hits = np.random.default_rng(3), 300, 0
    for _ in range(rounds):
        low, high = paired_loss_difference(*drawn_losses(generator, seeds, 60, spread, effect=0.05)).interval
        hits += low <= 0.05 <= high
    assert hits >= 0.92 * rounds


def test_a_lower_loss_is_better():
    assert loss_verdict_of(-0.01, (-0.02, -0.001)) == "better"
    assert loss_verdict_of(0.01, (0.001, 0.02)) == "worse"
    assert loss_verdict_of(-0.012, (-0.0271, 0.003)) == "no difference above 0.028 nats"  # rounded up
    losses, reference, tokens = drawn_losses(np.random.default_rng(4), 3, 60, effect=-0.5)
    found = paired_loss_difference(losses, reference, tokens)
    assert (found.verdict, found.value < found.interval[1] < 0) == ("better", True)
    assert paired_loss_difference(reference, losses, tokens).verdict == "worse"
    assert paired_loss_difference(losses[:1], reference[:1], tokens).verdict == "one seed: no verdict"
    assert paired_loss_difference(losses[:, :1], reference[:, :1], tokens[:1]).verdict == "one row: no verdict"


def test_more_data_narrow_the_interval_where_they_are_what_limits_it():
    """Rows limit it if seeds do not differ, and seeds limit it if they differ a lot."""
    by_rows, by_seeds = (
        paired_loss_difference(*drawn_losses(np.random.default_rng(5), 8, 60, spread)) for spread in (0.0, 0.5)
    )
    halves = [(each.interval[1] - each.interval[0]) / 2 for each in (by_rows, by_seeds)]
    assert by_rows.with_more_questions < 0.6 * halves[0] < by_rows.with_more_seeds
    assert by_seeds.with_more_seeds < 0.7 * halves[1] < by_seeds.with_more_questions


def test_a_larger_study_expects_the_error_that_it_finds():
    generator = np.random.default_rng(6)
    small, large = (drawn_losses(generator, seeds, rows, spread_of_seeds=0.02) for seeds, rows in ((30, 50), (30, 200)))
    expected, _ = two_way_error(loss_values(*small), (30, 200))
    assert expected == pytest.approx(two_way_error(loss_values(*large))[0], rel=0.25)

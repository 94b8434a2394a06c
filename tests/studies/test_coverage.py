"""How often verdicts are wrong, by drawing studies."""

import numpy as np
from studies.coverage import answers, share_wrong, table


def test_recipes_are_equally_good_and_seeds_differ():
    marks = answers(np.random.default_rng(0), 3, 400, 200, 1.0)
    assert marks.shape == (3, 400, 200)
    assert np.ptp(marks.mean((1, 2))) < 0.05
    assert 0.1 < marks.mean(2).std() < 0.2
    assert answers(np.random.default_rng(0), 3, 400, 200, 0.1).mean(2).std() < 0.05


def test_one_verdict_is_wrong_in_some_five_per_cent_of_studies():
    assert 0.01 < share_wrong(1, 6, 0.3, 300) < 0.1


def test_intervals_that_do_not_allow_for_the_number_of_recipes_would_be_found_out(monkeypatch):
    def alone(recipes, reference):
        return {name: paired_differences({name: marks}, reference)[name] for name, marks in recipes.items()}

    from studies import coverage

    paired_differences = coverage.paired_differences
    monkeypatch.setattr(coverage, "paired_differences", alone)
    assert share_wrong(13, 6, 0.3, 60) > 0.2


def test_the_table_has_a_line_for_every_number_of_seeds(monkeypatch):
    monkeypatch.setattr("studies.coverage.share_wrong", lambda recipes, seeds, spread, studies: spread * recipes / 100)
    assert table([5, 10], 1)[2:] == ["| 5 | 1.0 | 3.0 | 13.0 |", "| 10 | 1.0 | 3.0 | 13.0 |"]

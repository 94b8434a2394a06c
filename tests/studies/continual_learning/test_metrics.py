"""Overall performance and performance drop, from matrices of accuracies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola.studies.continual_learning.metrics import overall_performance, performance_drop


def test_metrics_of_a_matrix_computed_by_hand():
    matrix = [[0.8], [0.6, 0.9], [0.5, 1.0, 0.3]]
    assert overall_performance(matrix[:1]) == pytest.approx(0.8)
    assert overall_performance(matrix[:2]) == pytest.approx(0.75)
    assert overall_performance(matrix) == pytest.approx(0.6)
    assert performance_drop(matrix[:1]) is None
    assert performance_drop(matrix[:2]) == pytest.approx(-0.2)
    assert performance_drop(matrix) == pytest.approx((-0.3 + 0.1) / 2)


accuracies = st.floats(0, 1)
matrices = st.integers(1, 6).flatmap(
    lambda size: st.tuples(*(st.lists(accuracies, min_size=t, max_size=t) for t in range(1, size + 1)))
)


@given(matrices)
def test_metrics_stay_in_their_ranges(matrix):
    assert min(matrix[-1]) - 1e-12 <= overall_performance(matrix) <= max(matrix[-1]) + 1e-12
    drop = performance_drop(matrix)
    assert (drop is None) == (len(matrix) == 1)
    assert drop is None or -1 <= drop <= 1

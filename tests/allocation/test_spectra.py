"""Spectra of weights and their power-law exponents."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mola.allocation.measured import eigenvalues, power_law_exponent
from mola.errors import MolaError


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eigenvalues_are_squared_singular_values(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.linalg.svdvals(weight.double()).square().flip(0)
    found = eigenvalues(weight)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_exponent_by_hand():
    # Of 1, 2, 4, 8 the upper half is 4, 8 and the one below it 2: ln 2 + ln 4 = 3 ln 2.
    spectrum = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    assert power_law_exponent(spectrum) == pytest.approx(1 + 2 / (3 * math.log(2)))
    # With an odd count the half is rounded down: 3 against 2.
    assert power_law_exponent(spectrum[:3]) == pytest.approx(1 + 1 / math.log(2))


@pytest.mark.parametrize("exponent", [1.7, 2.5, 4.0])
def test_exponent_of_a_power_law(exponent):
    """Quantiles of the density x^-exponent, x >= 1; the estimate uses their upper half, which has the same law."""
    count = 20_000
    probabilities = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    spectrum = (1 - probabilities) ** (-1 / (exponent - 1))
    assert power_law_exponent(spectrum) == pytest.approx(exponent, rel=1e-3)


@given(st.lists(st.floats(0.01, 100), min_size=4, max_size=30, unique=True), st.floats(1e-3, 1e3))
def test_a_common_factor_changes_nothing(values, factor):
    spectrum = torch.tensor(sorted(values), dtype=torch.float64)
    if spectrum[-1] / spectrum[len(values) - len(values) // 2 - 1] > 1 + 1e-6:  # else the estimate is all rounding
        assert power_law_exponent(spectrum * factor) == pytest.approx(power_law_exponent(spectrum), rel=1e-5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), "a matrix"),
        (torch.tensor([[math.nan, 1.0], [1.0, 1.0]]), "finite"),
    ],
)
def test_matrices_without_a_spectrum_are_refused(weight, message):
    with pytest.raises(MolaError, match=message):
        eigenvalues(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(1, 5), "at least 2 eigenvalues"),
        (torch.ones(8, 8), "half its full rank"),
        (torch.eye(8), "differ"),
    ],
)
def test_spectra_without_a_power_law_are_refused(weight, message):
    with pytest.raises(MolaError, match=message):
        power_law_exponent(eigenvalues(weight))

"""Distances and overlaps of experts, against their definitions."""

import math

import pytest
import torch
from benchmarks.redundancy import SHAPES, direct_distances, peak_allocated, random_experts
from hypothesis import given
from hypothesis import strategies as st

from mola.insight.redundancy import expert_distances, mean_pairwise, subspace_overlaps


def direct(experts_A, experts_B):
    """The definition, with every update formed."""
    updates = torch.einsum("eri,ero->eoi", experts_A.double(), experts_B.double())
    return (updates.unsqueeze(0) - updates.unsqueeze(1)).flatten(2).norm(dim=2)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_distances_equal_the_definition(num_experts, r, width_in, width_out, seed):
    generator = torch.Generator().manual_seed(seed)
    experts_A = torch.randn(num_experts, r, width_in, generator=generator)
    experts_B = torch.randn(num_experts, r, width_out, generator=generator)
    distances = expert_distances(experts_A, experts_B, scaling=2.0)
    torch.testing.assert_close(distances, 2 * direct(experts_A, experts_B), rtol=1e-6, atol=1e-6)


def test_distance_of_nearly_equal_experts():
    """A difference that float32 would lose among the norms."""
    experts_A, experts_B = torch.randn(1, 4, 64).repeat(2, 1, 1), torch.randn(1, 4, 48).repeat(2, 1, 1)
    assert expert_distances(experts_A, experts_B)[0, 1] < 1e-5
    experts_B[1] += 1e-4 * torch.randn(4, 48)
    torch.testing.assert_close(
        expert_distances(experts_A, experts_B), direct(experts_A, experts_B), rtol=1e-4, atol=1e-6
    )


def test_mean_over_pairs():
    matrix = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 6.0], [2.0, 6.0, 0.0]])
    assert mean_pairwise(matrix) == 3.0
    assert math.isnan(mean_pairwise(torch.zeros(1, 1)))


def test_overlaps():
    stack = torch.zeros(4, 2, 8)
    stack[0, 0, 0] = stack[0, 1, 1] = 1
    stack[1, 0, 1] = stack[1, 1, 0] = 5  # the same plane
    stack[2, 0, 1] = stack[2, 1, 2] = 1  # shares one direction
    stack[3, 0, 7] = 1  # one direction only, orthogonal to all
    expected = [[1, 1, 0.5, 0], [1, 1, 0.5, 0], [0.5, 0.5, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(subspace_overlaps(stack), torch.tensor(expected, dtype=torch.float64))


def test_random_spaces_overlap_by_chance():
    torch.manual_seed(0)
    overlaps = subspace_overlaps(torch.randn(16, 4, 64))
    assert mean_pairwise(overlaps) == pytest.approx(4 / 64, rel=0.15)


def test_a_zero_factor_has_no_directions():
    overlaps = subspace_overlaps(torch.stack([torch.zeros(2, 8), torch.eye(2, 8)]))
    assert math.isnan(overlaps[0, 1])
    assert overlaps[1, 1] == 1


@pytest.mark.parametrize(("width_in", "width_out"), SHAPES)
def test_factors_need_a_hundredth_of_the_memory_of_updates(width_in, width_out):
    """In the shapes of LLaMA-2-7B, and to the same result; the direct way holds two updates at a time."""
    experts_A, experts_B = random_experts(width_in, width_out, seed=0)
    factors = peak_allocated(expert_distances, experts_A, experts_B)
    pair = experts_A[[2, 5]], experts_B[[2, 5]]  # what the direct way needs does not depend on the number of pairs
    direct_bytes = peak_allocated(direct_distances, *pair)
    assert direct_bytes >= 2 * 4 * width_in * width_out
    assert factors <= direct_bytes / 100
    expected = direct_distances(*pair)[0, 1].item()
    assert expert_distances(experts_A, experts_B)[2, 5].item() == pytest.approx(expected, rel=1e-5)

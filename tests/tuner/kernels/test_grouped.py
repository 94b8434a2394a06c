"""Products of chosen experts only: the same values and gradients as the formula, and where they are used."""

import pytest
import torch
from mola.tuner.mixture import MixtureSettings, add_mixture
from mola.tuner.sparse import pays

from mola import MolaError

from .test_mixture import TOLERANCE, check_against_the_formula, check_gradients_of_the_logits, make


@pytest.fixture
def sparse(monkeypatch):
    """Use them also where they would not pay."""
    monkeypatch.setattr("mola.tuner.mixture.pays", lambda *_: True)


def make_aligned(shape, num_experts=6, dtype=torch.float32, **options):
    return make(shape, num_experts, dtype, r=8, out=24, **{"fused": True, **options})


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("fused", [True, False], ids=["with_base", "base_apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "num_experts", "top_k"),
    [((2, 5, 8), 4, 2), ((6, 16), 3, 3), ((1, 8), 9, 1), ((1, 8), 9, 2), ((3, 9, 24), 40, 2)],
)
def test_values_and_gradients_follow_the_formula(shape, num_experts, top_k, dtype, fused, dropout, sparse):
    case = make_aligned(shape, num_experts, dtype, fused=fused, bias=True, dropout=dropout, top_k=top_k)
    check_against_the_formula(case, TOLERANCE[dtype])


@pytest.mark.parametrize("fused", [True, False])
def test_without_gradients_the_values_are_the_same(fused, sparse):
    base, leaves, _, settings = make_aligned((5, 9, 8), fused=fused)
    with torch.no_grad():
        quiet = add_mixture(base, *leaves[:4], None, settings)
    loud = add_mixture(base, *leaves[:4], None, settings)
    assert torch.equal(quiet.output, loud.output)
    assert torch.equal(quiet.logits, loud.logits)
    assert torch.equal(quiet.expert_indices, loud.expert_indices)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_the_logits_alone(fused, sparse):
    check_gradients_of_the_logits(make_aligned((5, 8), fused=fused))


def test_second_derivatives_are_refused(sparse):
    base, leaves, _, settings = make_aligned((4, 8))
    output = add_mixture(base, *leaves[:4], None, settings).output
    with pytest.raises(MolaError, match="create_graph"):
        torch.autograd.grad(output.sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_parts_get_no_gradient(frozen, sparse):
    base, leaves, _, settings = make_aligned((4, 8))
    leaves[frozen].requires_grad_(False)
    add_mixture(base, *leaves[:4], None, settings).output.sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [index == frozen for index in range(4)]


@pytest.mark.parametrize(
    ("num_experts", "r", "dtype", "tokens", "expected"),
    [
        (24, 8, torch.float32, 512, True),
        (23, 8, torch.float32, 512, "torch"),  # oneDNN makes the products of all in half the time
        (16, 8, torch.float32, 512, "torch"),
        (15, 8, torch.float32, 512, False),
        (64, 8, torch.float32, 512, True),
        (64, 8, torch.float32, 63, False),  # most experts would be idle
        (64, 6, torch.float32, 512, False),  # rows of r numbers are not whole 16 bytes
        (8, 8, torch.float32, 512, False),
        (64, 8, torch.bfloat16, 512, False),
        (64, 8, torch.float64, 512, False),
    ],
)
@pytest.mark.parametrize("library", ["oneDNN", "torch"])
def test_where_they_are_used(num_experts, r, dtype, tokens, expected, library, monkeypatch):
    monkeypatch.setattr("mola.tuner.sparse.onednn_is_faster", lambda: library == "oneDNN")
    experts_A, experts_B = torch.empty(num_experts, r, 16), torch.empty(num_experts, r, 32)
    found = pays(torch.empty(tokens, 16), experts_A, experts_B, MixtureSettings(2, 1.0, dtype))
    assert found == (expected is True or expected == library)

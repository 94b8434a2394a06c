"""Choosing experts: the paper's formula, ties, precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mola.insight.recorder import router_entropies
from mola.tuner.routing import (
    _FEW_TOKENS,
    ROUTERS,
    Routing,
    dense_gates,
    jitter,
    router_backward,
    router_logits,
    router_logits_by_expert,
    top_k_softmax,
    top_k_softmax_backward,
)


def reference_gates(logits, top_k):
    """Softmax over all experts, the largest kept (lower index first among equals), renormalised."""
    gates = torch.zeros_like(logits)
    for token, row in enumerate(logits.softmax(-1)):
        order = sorted(range(len(row)), key=lambda e: (-row[e].item(), e))[:top_k]
        gates[token, order] = row[order] / row[order].sum()
    return gates


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 20),
    num_experts=st.integers(2, 12),
    data=st.data(),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
)
def test_gates_follow_the_formula(tokens, num_experts, data, scale):
    top_k = data.draw(st.integers(1, num_experts))
    seed = data.draw(st.integers(0, 1000))
    logits = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = logits * scale
    gates = dense_gates(top_k_softmax(logits, top_k), num_experts)
    torch.testing.assert_close(gates, reference_gates(logits, top_k), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(gates.sum(-1), torch.ones(tokens, dtype=torch.float64))
    assert ((gates > 0).sum(-1) <= top_k).all()


def test_ties_go_to_the_lower_index():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 1.0]])
    assert top_k_softmax(logits, 2).expert_indices.tolist() == [[1, 2], [0, 1], [0, 2]]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_many_tokens_get_the_same_experts_as_few(top_k, dim):
    """Few are sorted; many are passed over `top_k` times."""
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 2.0], [3.0, 1.0, 3.0, 3.0], [-1.0, 4.0, 4.0, 5.0]])
    logits = rows.repeat(_FEW_TOKENS, 1)
    few, many = (
        top_k_softmax(each if dim == 1 else each.t().contiguous(), top_k, dim) for each in (logits[:4], logits)
    )
    for one, all_of_them in zip(few, many, strict=True):
        parts = all_of_them.split(4, 1 - dim)
        assert len(parts) == _FEW_TOKENS
        assert all(torch.equal(part, one) for part in parts)


def sigmoid_router(logits, top_k, dim):
    """The largest experts, each with a gate of its own between 0 and 1."""
    chosen = top_k_softmax(logits, top_k, dim).expert_indices
    return Routing(chosen, logits.gather(dim, chosen).sigmoid())


@pytest.mark.parametrize("router", [top_k_softmax, sigmoid_router])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradients_of_routers(router, top_k, monkeypatch):
    """By autograd for any router, written out for that of the paper: `<t_e, a_e>` is what both are given."""
    monkeypatch.setitem(ROUTERS, "tested", router)
    generator = torch.Generator().manual_seed(0)
    logits, hidden, grad = (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    weights = 1.5 * dense_gates(router(logits, top_k, 0), 4, 0)
    (expected,) = torch.autograd.grad((weights * hidden * grad).sum(), logits)
    agreement = (weights * hidden * grad).detach()
    torch.testing.assert_close(router_backward("tested", logits, top_k, agreement), expected)
    if router is top_k_softmax:
        extra = torch.ones(4, 9, dtype=torch.float64)
        found = top_k_softmax_backward(agreement, weights.detach(), 1.5, extra, out=torch.empty_like(extra))
        torch.testing.assert_close(found, expected + 1)


def test_a_gate_of_zero_has_finite_gradients(monkeypatch):
    """Far below the largest, a chosen expert's gate is 0 in float32."""
    monkeypatch.setitem(ROUTERS, "tested", top_k_softmax)
    logits = torch.tensor([[200.0, 1.0], [0.0, 2.0], [-5.0, 0.5]])
    agreement = torch.tensor([[0.5, 0.25], [0.0, 0.75], [0.0, 0.0]])
    found = router_backward("tested", logits, 2, agreement)
    gates = dense_gates(top_k_softmax(logits, 2, 0), 3, 0)
    torch.testing.assert_close(found, agreement - gates * agreement.sum(0))


def test_one_choice_has_gate_one_and_no_gradient():
    logits = torch.randn(5, 3, requires_grad=True)
    routing = top_k_softmax(logits, 1)
    assert torch.equal(routing.routing_weights, torch.ones(5, 1))
    routing.routing_weights.sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_float32_under_autocast(dtype):
    x, weight = torch.randn(2, 7, 16, dtype=dtype), torch.randn(4, 16)
    expected = x.reshape(-1, 16).float() @ weight.t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router_logits(x, weight)
        by_expert = router_logits_by_expert(x.view(-1, 16), weight)
    assert logits.dtype == by_expert.dtype == torch.float32
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(by_expert, expected.t())


@pytest.mark.parametrize("dim", [0, 1])
def test_entropy_is_a_share_of_the_largest(dim):
    even, sure = torch.zeros(3), torch.tensor([0.0, 100.0, 0.0])
    half = torch.tensor([0.0, 0.0, -100.0])
    found = router_entropies(torch.stack([even, sure, half], 1 - dim), dim)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, math.log(2) / math.log(3)]))


def test_jitter_stays_in_its_range():
    x = torch.full((1000,), 2.0)
    noisy = jitter(x, 0.1)
    assert (noisy >= 1.8).all()
    assert (noisy <= 2.2).all()
    assert noisy.std() > 0.05


def test_little_jitter_of_numbers_in_half_precision_is_not_rounded_away():
    noisy = jitter(torch.full((1000,), 2.0, dtype=torch.bfloat16), 1e-3)
    assert noisy.std() > 1e-3
    assert abs(noisy.mean() - 2.0) < 1e-3

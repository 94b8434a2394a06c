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
    Router,
    Routing,
    dense_gates,
    jitter,
    route,
    router_backward,
    router_logits,
    router_logits_by_expert,
    sparsegen,
    top_k_constant,
    top_k_softmax,
    top_k_softmax_backward,
    used_experts,
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


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_tokens", [3, 100])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_constant_gates_have_the_gradient_of_the_softmax(top_k, num_tokens, dim):
    shape = (5, num_tokens) if dim == 0 else (num_tokens, 5)
    logits, weights = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, softmax = top_k_constant(logits, top_k, dim), top_k_softmax(logits, top_k, dim)
    assert torch.equal(found.expert_indices, softmax.expert_indices)
    assert torch.equal(found.routing_weights, torch.full_like(softmax.routing_weights, 1 / top_k))
    gradients = [
        torch.autograd.grad((dense_gates(each, 5, dim) * weights).sum(), logits, retain_graph=True)[0]
        for each in (found, softmax)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].any() == (top_k > 1)


def projection(logits, top_k, sparsegen_lambda):
    """The projection of `sparsegen` by bisection of tau, token by token."""
    gates = torch.zeros_like(logits)
    for token, row in enumerate(logits):
        order = sorted(range(len(row)), key=lambda e: (-row[e].item(), e))[:top_k]
        low, high = row.min() - 100, row.max()
        for _ in range(200):
            tau = (low + high) / 2
            total = (row[order] - tau).clamp(min=0).sum() / (1 - sparsegen_lambda)
            low, high = (tau, high) if total > 1 else (low, tau)
        gates[token, order] = (row[order] - tau).clamp(min=0) / (1 - sparsegen_lambda)
    return gates


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.sampled_from([1, 5, 40]),
    num_experts=st.integers(2, 9),
    sparsegen_lambda=st.sampled_from([0.0, 0.9, -3.0]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    dim=st.sampled_from([0, 1]),
    data=st.data(),
)
def test_sparse_gates_are_the_projection_with_its_gradient(tokens, num_experts, sparsegen_lambda, scale, dim, data):
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits, weights = torch.randn(2, tokens, num_experts, generator=generator, dtype=torch.float64)
    logits = (logits * scale).requires_grad_()
    given = logits if dim == 1 else logits.t()
    routing = sparsegen(given, top_k, dim, sparsegen_lambda)
    gates = dense_gates(routing, num_experts, dim)
    gates = gates if dim == 1 else gates.t()
    torch.testing.assert_close(gates, projection(logits.detach(), top_k, sparsegen_lambda), atol=1e-9, rtol=1e-9)
    (found,) = torch.autograd.grad((gates * weights).sum(), logits)
    used = (gates > 0).double()
    mean = (used * weights).sum(1, keepdim=True) / used.sum(1, keepdim=True)
    torch.testing.assert_close(found, used * (weights - mean) / (1 - sparsegen_lambda), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_sparse_gates_of_logits_at_minus_infinity_and_far_apart(top_k):
    logits = torch.tensor([[0.0, float("-inf"), float("-inf")], [500.0, 0.0, -500.0]], requires_grad=True)
    gates = dense_gates(sparsegen(logits, top_k), 3)
    assert torch.equal(gates, torch.tensor([[1.0, 0.0, 0.0]] * 2))
    (gradient,) = torch.autograd.grad(gates[:, 0].sum(), logits)
    assert not gradient.any()


def test_sparsegen_gets_its_lambda():
    logits = torch.tensor([[1.0, 0.5, 0.0]])
    for router, sparsegen_lambda in ((Router("sparsegen"), 0.0), (Router("sparsegen", 0.25), 0.25)):
        found, expected = route(router, logits, 3), sparsegen(logits, 3, -1, sparsegen_lambda)
        assert torch.equal(found.routing_weights, expected.routing_weights)


def test_experts_with_a_gate_of_zero_are_not_used():
    logits = torch.tensor([[[5.0, 4.9, 0.0, 0.0], [1.0, 2.0, 3.0, 0.0]]])
    chosen = torch.tensor([[[0, 1, 2], [2, 1, 0]]])
    assert used_experts(Router("sparsegen"), logits, chosen).tolist() == [[[1, 1, 0, 0], [0, 0, 1, 0]]]
    assert used_experts(Router("top_k_constant"), logits, chosen).tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0]]]


@pytest.mark.parametrize("router", [top_k_softmax, top_k_constant, sparsegen, sigmoid_router])
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
    torch.testing.assert_close(router_backward(Router("tested"), logits, top_k, agreement), expected)
    if router is top_k_softmax:
        extra = torch.ones(4, 9, dtype=torch.float64)
        found = top_k_softmax_backward(agreement, weights.detach(), 1.5, extra, out=torch.empty_like(extra))
        torch.testing.assert_close(found, expected + 1)


def test_a_gate_of_zero_has_finite_gradients(monkeypatch):
    """Far below the largest, a chosen expert's gate is 0 in float32."""
    monkeypatch.setitem(ROUTERS, "tested", top_k_softmax)
    logits = torch.tensor([[200.0, 1.0], [0.0, 2.0], [-5.0, 0.5]])
    agreement = torch.tensor([[0.5, 0.25], [0.0, 0.75], [0.0, 0.0]])
    found = router_backward(Router("tested"), logits, 2, agreement)
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

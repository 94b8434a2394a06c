"""Gates and their gradient, natively and in operators of torch: any size, ties, and where which is used."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mola.tuner.kernels import gates, native
from mola.tuner.kernels.api import MixtureSettings
from mola.tuner.kernels.gates import apply_gates, gates_backward
from mola.tuner.routing import ROUTERS, dense_gates, top_k_softmax

from .native import needs_numba

DTYPES = (torch.float32, torch.bfloat16)
NORM = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 3e-2, "rtol": 1e-2}}


def take(patch, is_native):
    patch.setattr(gates, "_may_be_native", lambda *arguments: is_native)


@pytest.fixture(params=[pytest.param("native", marks=needs_numba), "torch"])
def way(request, monkeypatch):
    """Both ways, whatever the number of threads."""
    take(monkeypatch, request.param == "native")
    return request.param


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def settings(top_k=2, scaling=1.0):
    return MixtureSettings(top_k, scaling, torch.float32)


@pytest.mark.parametrize("is_native", [pytest.param(True, marks=needs_numba), False], ids=["native", "torch"])
@given(
    st.integers(1, 40),
    st.sampled_from([1, 3, 16, 767, 769, 1600]),
    st.integers(2, 9),
    st.integers(1, 9),
    st.data(),
)
def test_any_size(is_native, num_tokens, in_features, num_experts, r, data):
    """Those of `top_k_softmax`, and their gradient that of autograd, both in float64."""
    values, products = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    asked = settings(data.draw(st.integers(1, num_experts)), 1.5)
    tokens, router = draw(num_tokens, in_features, dtype=values), draw(num_experts, in_features, seed=1)
    hidden = draw(num_experts * r, num_tokens, dtype=products, seed=2)
    gated, exact = hidden.clone(), hidden.double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        take(patch, is_native)
        found = apply_gates(tokens, router, gated, asked)
    torch.testing.assert_close(found.logits, (tokens.float() @ router.t()).t(), atol=1e-4, rtol=1e-5)
    logits = found.logits.double().requires_grad_()
    routing = top_k_softmax(logits, asked.top_k, 0)
    weights = dense_gates(routing, num_experts, 0) * 1.5
    expected = (exact.view(num_experts, r, -1) * weights.unsqueeze(1)).flatten(0, 1)
    torch.testing.assert_close(found.weights, weights.float())
    assert torch.equal(found.expert_indices.sort(0).values, routing.expert_indices.sort(0).values)
    torch.testing.assert_close(gated.double(), expected, **TOLERANCE[products])
    grad_gated, grad_logits = draw(*hidden.shape, dtype=products, seed=3), draw(*logits.shape, seed=4)
    grad_logits = data.draw(st.sampled_from([None, grad_logits]))
    total = (expected * grad_gated.double()).sum() + (0 if grad_logits is None else (logits * grad_logits).sum())
    expected_gradient = torch.cat(torch.autograd.grad(total, (exact, logits)))
    with pytest.MonkeyPatch.context() as patch:
        take(patch, is_native)
        gradient = gates_backward(grad_gated, expected.detach().to(products), found.weights, None, grad_logits, asked)
    assert gradient.dtype == products
    for part in (slice(None, len(hidden)), slice(len(hidden), None)):
        distance = (gradient.double() - expected_gradient)[part].norm()
        assert distance <= NORM[products] * expected_gradient[part].norm().clamp(min=1.0)


@needs_numba
@pytest.mark.parametrize("values", DTYPES)
def test_a_token_does_not_depend_on_its_neighbours(values, monkeypatch):
    take(monkeypatch, is_native=True)
    tokens, router = draw(37, 1000, dtype=values), draw(5, 1000, seed=1)
    together = apply_gates(tokens, router, torch.ones(5, 37), settings())
    for n in (0, 7, 8, 35, 36):
        alone = apply_gates(tokens[n : n + 1], router, torch.ones(5, 1), settings())
        assert torch.equal(alone.logits[:, 0], together.logits[:, n])
        assert torch.equal(alone.weights[:, 0], together.weights[:, n])


def test_of_equal_logits_the_first_are_chosen(way):
    # Equal rows make equal logits natively; a library adds up in another order from row to row.
    router = draw(1, 6).repeat(5, 1) if way == "native" else torch.zeros(5, 6)
    found = apply_gates(draw(9, 6), router, torch.ones(10, 9), settings(3))
    assert torch.equal(found.weights != 0, torch.tensor([True] * 3 + [False] * 2)[:, None].expand(5, 9))
    assert torch.equal(found.weights[:3], torch.full((3, 9), 1 / 3))


def test_what_is_no_number_stays_with_its_token(way):
    tokens = draw(9, 6)
    tokens[4, 2] = float("nan")
    found = apply_gates(tokens, draw(5, 6, seed=1), torch.ones(10, 9), settings())
    broken = torch.arange(9) == 4
    assert torch.equal(found.weights.isnan().any(0), broken)
    assert torch.equal(found.logits.isnan().all(0), broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.3e38])
def test_numbers_at_the_end_of_the_range(value, way):
    hidden = torch.ones(6, 9, dtype=torch.bfloat16)
    hidden[:, 4] = value
    expected = hidden.clone()
    apply_gates(draw(9, 6), torch.zeros(2, 6), hidden, settings(2, 2.0))  # both gates are 1/2
    torch.testing.assert_close(hidden, expected, equal_nan=True, atol=0, rtol=0)


def test_no_tokens_at_all(way):
    found = apply_gates(torch.ones(0, 6), draw(5, 6), torch.ones(10, 0), settings())
    assert found.logits.shape == found.weights.shape == (5, 0)
    assert found.expert_indices.shape == (2, 0)
    inner = gates_backward(torch.ones(10, 0), torch.ones(10, 0), torch.ones(5, 0), None, None, settings())
    assert inner.shape == (15, 0)


@needs_numba
def test_where_the_native_functions_are_used(monkeypatch):
    called = []
    monkeypatch.setattr(native, "load", called.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ones = torch.ones(6, 4)
    apply_gates(draw(4, 6), draw(3, 6), ones.clone(), settings())
    gates_backward(ones, ones, torch.ones(3, 4), None, None, settings())
    assert called == ["jit_gates"] * 2
    wide = ones.double()
    apply_gates(draw(4, 6).double(), draw(3, 6).double(), wide.clone(), settings())
    gates_backward(wide, wide, wide[:3], None, None, settings())
    with torch.device("meta"):
        apply_gates(torch.ones(4, 6), torch.ones(3, 6), torch.ones(6, 4), settings())
    with pytest.raises(RuntimeError):  # of torch, which says what does not fit
        apply_gates(draw(4, 5), draw(3, 6), ones.clone(), settings())
    with pytest.raises(RuntimeError):
        apply_gates(draw(4, 6), draw(4, 6), ones.clone(), settings())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    apply_gates(draw(4, 6), draw(3, 6), ones.clone(), settings())
    gates_backward(ones, ones, torch.ones(3, 4), None, None, settings())
    assert len(called) == 2


@needs_numba
def test_other_routers_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(native, "load", lambda name: pytest.fail(name))
    monkeypatch.setitem(ROUTERS, "first", lambda logits, top_k, dim: top_k_softmax(logits, top_k, dim))
    other = settings()._replace(router="first")
    found = apply_gates(draw(4, 6), draw(3, 6), torch.ones(6, 4), other)
    gates_backward(torch.ones(6, 4), torch.ones(6, 4), found.weights, found.logits, None, other)


def test_products_of_float16_numbers_may_be_larger_than_float16_holds(monkeypatch):
    """As under a gradient scaler: 300 * 300 is above 65,504."""
    take(monkeypatch, False)
    large = torch.full((2, 5), 300.0, dtype=torch.float16)
    weights = torch.tensor([[0.75] * 5, [0.25] * 5])
    found = gates_backward(large, large, weights, None, None, MixtureSettings(2, 1.0, torch.float16))
    agreement = torch.full((2, 5), 90_000.0)
    expected = agreement - weights * agreement.sum(0)
    assert torch.equal(found[2:], expected.half())
    assert found.isfinite().all()

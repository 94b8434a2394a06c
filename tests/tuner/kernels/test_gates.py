"""Gates and their gradient, natively and in operators of torch: the formula, ties, and where which is used."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mola.tuner.gates import apply_gates, through_gates

import mola
from mola.tuner import gates
from mola.tuner.routing import dense_gates, top_k_softmax

HAS_NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="needs numba (the extra `cpu`)")
FORMATS = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 3e-2, "rtol": 1e-2}}


@pytest.fixture(params=[pytest.param("native", marks=needs_numba), "torch"])
def way(request, monkeypatch):
    """Both ways, whatever the number of threads."""
    monkeypatch.setattr(gates, "_is_native", lambda *tensors: request.param == "native")
    return request.param


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def check_gates(num_tokens, in_features, num_experts, r, top_k, values, products):
    tokens, router = draw(num_tokens, in_features, dtype=values), draw(num_experts, in_features, seed=1)
    hidden = draw(num_experts * r, num_tokens, dtype=products, seed=2)
    gated = hidden.clone()
    found = apply_gates(tokens, router, gated, top_k, 1.5)
    expected = tokens.float() @ router.t()
    routing = top_k_softmax(found.logits.t(), top_k)
    torch.testing.assert_close(found.logits.t(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.weights.t(), dense_gates(routing, num_experts) * 1.5)
    assert torch.equal(found.expert_indices.sort(0).values, routing.expert_indices.t().sort(0).values)
    wanted = hidden.float().view(num_experts, r, -1) * found.weights.unsqueeze(1)
    torch.testing.assert_close(gated.float(), wanted.flatten(0, 1), **TOLERANCE[products])


@pytest.mark.parametrize("products", FORMATS)
@pytest.mark.parametrize("values", FORMATS)
def test_gates_follow_the_formula(values, products, way):
    check_gates(21, 40, 5, 3, 2, values, products)


@needs_numba
@given(
    st.integers(1, 40),
    st.sampled_from([1, 3, 16, 767, 769, 1600]),
    st.integers(2, 9),
    st.integers(1, 9),
    st.data(),
)
def test_native_gates_of_any_size(num_tokens, in_features, num_experts, r, data):
    top_k = data.draw(st.integers(1, num_experts))
    values, products = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from(FORMATS))
    before = gates._is_native
    gates._is_native = lambda *tensors: True
    try:
        check_gates(num_tokens, in_features, num_experts, r, top_k, values, products)
    finally:
        gates._is_native = before


@needs_numba
@pytest.mark.parametrize("values", FORMATS)
def test_a_token_does_not_depend_on_its_neighbours(values, monkeypatch):
    monkeypatch.setattr(gates, "_is_native", lambda *tensors: True)
    tokens, router = draw(37, 1000, dtype=values), draw(5, 1000, seed=1)
    together = apply_gates(tokens, router, torch.ones(5, 37), 2, 1.0)
    for n in (0, 7, 8, 35, 36):
        alone = apply_gates(tokens[n : n + 1], router, torch.ones(5, 1), 2, 1.0)
        assert torch.equal(alone.logits[:, 0], together.logits[:, n])
        assert torch.equal(alone.weights[:, 0], together.weights[:, n])


def test_of_equal_logits_the_first_are_chosen(way):
    # Equal rows make equal logits natively; a library adds up in another order from row to row.
    router = draw(1, 6).repeat(5, 1) if way == "native" else torch.zeros(5, 6)
    found = apply_gates(draw(9, 6), router, torch.ones(10, 9), 3, 1.0)
    assert torch.equal(found.weights != 0, torch.tensor([True] * 3 + [False] * 2)[:, None].expand(5, 9))
    assert torch.equal(found.weights[:3], torch.full((3, 9), 1 / 3))


def test_what_is_no_number_stays_with_its_token(way):
    tokens = draw(9, 6)
    tokens[4, 2] = float("nan")
    found = apply_gates(tokens, draw(5, 6, seed=1), torch.ones(10, 9), 2, 1.0)
    broken = torch.arange(9) == 4
    assert torch.equal(found.weights.isnan().any(0), broken)
    assert torch.equal(found.logits.isnan().all(0), broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.3e38])
def test_numbers_at_the_end_of_the_range(value, way):
    hidden = torch.ones(6, 9, dtype=torch.bfloat16)
    hidden[:, 4] = value
    expected = hidden.clone()
    apply_gates(draw(9, 6), torch.zeros(2, 6), hidden, 2, 2.0)  # both gates are 1/2
    torch.testing.assert_close(hidden, expected, equal_nan=True, atol=0, rtol=0)


def test_no_tokens_at_all(way):
    found = apply_gates(torch.ones(0, 6), draw(5, 6), torch.ones(10, 0), 2, 1.0)
    assert found.logits.shape == found.weights.shape == (5, 0)
    assert found.expert_indices.shape == (2, 0)
    inner = through_gates(torch.ones(10, 0), torch.ones(10, 0), torch.ones(5, 0), None, 1.0)
    assert inner.shape == (15, 0)


def test_input_with_gaps(way):
    tokens, router = draw(9, 12)[:, ::2], draw(5, 12, seed=1)[:, ::2]
    hidden = torch.ones(5, 9)
    expected = apply_gates(tokens.contiguous(), router.contiguous(), hidden.clone(), 2, 1.0)
    found = apply_gates(tokens, router, hidden, 2, 1.0)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_logits", [False, True], ids=["output", "output and logits"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("num_experts", "r", "top_k"), [(2, 8, 2), (5, 3, 2), (3, 1, 1)])
def test_the_gradient_is_that_of_the_formula(num_experts, r, top_k, dtype, with_logits, way):
    num_tokens, scaling = 19, 1.5
    logits = draw(num_experts, num_tokens).double().requires_grad_()
    hidden = draw(num_experts * r, num_tokens, dtype=dtype, seed=1).double().requires_grad_()
    weights = dense_gates(top_k_softmax(logits.t(), top_k), num_experts).t() * scaling
    gated = (hidden.view(num_experts, r, -1) * weights.unsqueeze(1)).flatten(0, 1)
    grad_gated, grad_logits = (
        draw(num_experts * r, num_tokens, dtype=dtype, seed=2),
        draw(num_experts, num_tokens, seed=3),
    )
    total = (gated * grad_gated.double()).sum() + (logits * grad_logits.double()).sum() * with_logits
    expected = torch.cat(torch.autograd.grad(total, (hidden, logits)))
    found = through_gates(
        grad_gated, gated.detach().to(dtype), weights.detach().float(), grad_logits if with_logits else None, scaling
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype]["atol"] * r, rtol=1e-2)


COMPUTE = """
import hashlib, torch
from mola.tuner.gates import apply_gates, through_gates
from mola.tuner.native_few import add_few

torch.set_num_threads(1)
torch.manual_seed(0)
for in_features, num_experts, r in ((32, 4, 4), (64, 3, 2), (576, 8, 8)):
    x, router = torch.randn(40, in_features), torch.randn(num_experts, in_features)
    hidden = torch.randn(num_experts * r, 40)
    found = apply_gates(x, router, hidden, 2, 2.0)
    inner = through_gates(torch.randn(num_experts * r, 40), hidden, found.weights, None, 2.0)
    output, A, B = torch.zeros(3, 24), torch.randn(num_experts, r, in_features), torch.randn(num_experts, r, 24)
    add_few(output, x[:3], A, B, router, 2.0, 2)
    for tensor in (*found, hidden, inner, output):
        print(hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
"""


@needs_numba
def test_code_just_compiled_and_code_from_the_disk_make_the_same_bits(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPUTE]
    first, second = (subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert len(first.stdout.split()) == 18
    assert first.stdout == second.stdout
    assert any(tmp_path.rglob("*.nbc"))


@needs_numba
def test_code_on_the_disk_is_not_used_when_a_source_changes_that_it_was_compiled_from(tmp_path):
    """numba alone compares the source of the outermost function, here `native_routing.py`."""
    shutil.copytree(Path(mola.__file__).parent, tmp_path / "mola", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        "import torch; from mola.tuner.gates import apply_gates; torch.set_num_threads(1);"
        "print(apply_gates(torch.ones(1, 8), torch.ones(2, 8), torch.ones(2, 1), 2, 1.0).weights.sum().item())",
    ]
    weights = []
    for factor in ("scaling", "scaling * 3"):
        source = tmp_path / "mola" / "tuner" / "native.py"
        text = source.read_text(encoding="utf-8")
        assert "/ total * scaling" in text
        source.write_text(text.replace("/ total * scaling", f"/ total * {factor}"), encoding="utf-8")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        weights.append(float(done.stdout))
    assert weights == [1.0, 3.0]


@needs_numba
def test_where_the_native_functions_are_used(monkeypatch):
    called = []
    monkeypatch.setattr(gates, "import_native", called.append)
    arguments = draw(4, 6), draw(3, 6), torch.ones(6, 4), 2, 1.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    apply_gates(*arguments)
    through_gates(torch.ones(6, 4), torch.ones(6, 4), torch.ones(3, 4), None, 1.0)
    assert len(called) == 2
    apply_gates(draw(4, 6).double(), draw(3, 6).double(), torch.ones(6, 4, dtype=torch.float64), 2, 1.0)
    with torch.device("meta"):
        apply_gates(torch.ones(4, 6), torch.ones(3, 6), torch.ones(6, 4), 2, 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    apply_gates(*arguments)
    assert len(called) == 2

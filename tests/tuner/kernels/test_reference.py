"""The reference backend follows the formula as it is written; so do its siblings, each where it is meant for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dropout import drop, sample_dropout_mask
from mola.tuner.kernels.reference import Gathered, Lora, Reference
from tests.grids import slow

from .inputs import LEAVES, in_float64, leaves, make_inputs
from .native import needs_numba


def formula(inputs):
    """Token by token and expert by expert; of equal logits the first are chosen."""
    settings = inputs.settings
    rows = inputs.x.flatten(0, -2)
    base = inputs.base_output if inputs.weight is None else F.linear(inputs.x, inputs.weight, inputs.bias)
    mask = torch.ones_like(rows) if inputs.dropout_mask is None else inputs.dropout_mask.view(rows.shape)
    updates = []
    for row, kept in zip(rows, mask, strict=True):
        logits = [float(row @ vector) for vector in inputs.router]
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[: settings.top_k]
        gates = torch.tensor([logits[e] for e in chosen], dtype=row.dtype).softmax(0)
        updates.append(
            sum(
                gate * settings.scaling * (inputs.experts_B[e].t() @ (inputs.experts_A[e] @ (row * kept)))
                for gate, e in zip(gates, chosen, strict=True)
            )
        )
    return base + torch.stack(updates).view(base.shape), (rows @ inputs.router.t()).t()


@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.booleans(), st.data()
)
def test_the_formula(num_tokens, in_features, num_experts, r, fused, dropout, data):
    top_k = data.draw(st.integers(1, num_experts))
    options = {"r": r, "top_k": top_k, "fused": fused, "bias": True, "dropout": dropout}
    inputs = make_inputs((num_tokens, in_features), num_experts, torch.float64, **options)
    with torch.no_grad():
        expected = formula(inputs)
        for backend in (Reference(), Gathered()):
            found = compute(backend, inputs)
            for one, two in zip(found, expected, strict=False):
                torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("fused", [True, *slow(False)])
def test_gradients(fused):
    inputs = make_inputs((2, 3, 5), 4, torch.float64, fused=fused, dropout=True)

    def function(*tensors):
        changed = inputs._replace(**dict(zip(LEAVES, tensors, strict=False)))
        return compute(Reference(), changed)[:2]

    assert torch.autograd.gradcheck(function, leaves(inputs))
    assert torch.autograd.gradgradcheck(function, leaves(inputs))


def test_dropout_is_that_of_torch():
    inputs, p = make_inputs((20, 30), 4, torch.float64), 0.3
    settings = inputs.settings
    torch.manual_seed(1)
    found = compute(Reference(), inputs._replace(settings=settings._replace(dropout=p)))
    torch.manual_seed(1)
    mask = F.dropout(torch.ones_like(inputs.x), p) > 0
    scaled = settings._replace(scaling=settings.scaling / (1 - p))
    expected = compute(Reference(), inputs._replace(dropout_mask=mask, settings=scaled))
    torch.testing.assert_close(found, expected)


@needs_numba
def test_a_seed_is_the_mask_that_it_draws():
    inputs = make_inputs((20, 30), 4, torch.float64)
    seed, _ = sample_dropout_mask(inputs.x, 0.3)
    results = []
    for mask in (seed, drop(torch.ones_like(inputs.x), seed).bool()):
        output = compute(Reference(), inputs._replace(dropout_mask=mask)).output
        results.append([output, *torch.autograd.grad(output.sin().sum(), leaves(inputs))])
    torch.testing.assert_close(*results)


def test_jitter_is_seen_by_the_router_only():
    inputs = make_inputs((20, 30), 4, torch.float32)
    noisy = inputs._replace(settings=inputs.settings._replace(jitter=0.5))
    before, after = compute(Reference(), inputs), compute(Reference(), noisy)
    assert not torch.allclose(before.logits, after.logits)
    flat = {"router": torch.zeros(4, 30)}
    before, after = (compute(Reference(), each._replace(**flat)) for each in (inputs, noisy))
    assert torch.equal(before.output, after.output)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_one_expert_is_lora(p):
    inputs = make_inputs((5, 9), 1, torch.float32, top_k=1, fused=False)
    inputs = inputs._replace(router=None, settings=inputs.settings._replace(dropout=p))
    torch.manual_seed(1)
    found = compute(Lora(), inputs)
    torch.manual_seed(1)
    hidden = F.linear(F.dropout(inputs.x, p), inputs.experts_A[0])
    assert torch.equal(found.output, inputs.base_output + F.linear(hidden, inputs.experts_B[0].t().contiguous()) * 1.7)
    assert found.logits is found.expert_indices is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_gathered_experts_are_multiplied_in_float32(dtype):
    inputs = make_inputs((6, 40), 4, dtype, out=50)
    exact = compute(Reference(), in_float64(inputs)).output
    found = compute(Gathered(), inputs).output
    assert found.dtype == torch.float32
    # What is rounded is the base output alone.
    base = F.linear(inputs.x, inputs.weight)
    error = found - exact - (base - F.linear(inputs.x.double(), inputs.weight.double()))
    assert error.abs().max() < 1e-5


def test_where_they_are_used(monkeypatch):
    inputs = make_inputs((8, 40), 4, torch.float32)
    assert Gathered().why_unsupported(inputs) == "gradients are recorded"
    with torch.no_grad():
        assert Gathered().why_unsupported(inputs) is None
        assert Gathered().why_slower(inputs) == "only faster under a compiler"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert Gathered().why_slower(inputs) is None
        for shape, device in (((9, 40), "cpu"), ((2, 40), "meta")):  # of 4 experts 4 are read for two tokens
            assert Gathered().why_slower(inputs._replace(x=torch.empty(shape, device=device))) == "too many tokens"
        assert Gathered().why_slower(inputs._replace(x=torch.empty(1, 40, device="meta"))) is None
    single = inputs._replace(router=None)
    reasons = [backend.why_unsupported(single) for backend in (Lora(), Gathered(), Reference())]
    assert reasons == [None, *["a layer with one expert has no router"] * 2]
    assert Lora().why_unsupported(inputs) == "there are several experts"

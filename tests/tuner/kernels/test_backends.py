"""What every backend promises besides its values, which `test_parity` compares."""

import pytest
import torch
import torch.nn.functional as F

from mola import MolaError
from mola.tuner.kernels import gemm as library
from mola.tuner.kernels.api import Grads
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dispatch import BACKENDS
from mola.tuner.kernels.reference import Reference

from ..counting import CountOperators
from .inputs import in_float64, leaves, make_inputs
from .native import has_vectors, needs_numba, needs_onednn, needs_vectors

BY_NAME = {backend.name: backend for backend in BACKENDS}
NATIVE = {"cpu_decode": needs_numba, "cpu_train": needs_vectors(torch.float32)}
ROUTED = ["cpu_decode", "gathered", "decode", "cpu_train", "grouped", "dense", "reference"]
RECORDED = ["cpu_train", "grouped", "dense", "reference"]
WRITTEN_OUT = RECORDED[:-1]
IN, OUT = 32, 64  # which suit all of them


def each(names, without=()):
    names = [name for name in names if name not in without]
    return pytest.mark.parametrize("name", [pytest.param(name, marks=NATIVE.get(name, ())) for name in names])


with_and_without_base = pytest.mark.parametrize("fused", [True, False], ids=["with_base", "base_apart"])


def make(shape=(6, 7, IN), num_experts=4, dtype=torch.float32, **options):
    inputs = make_inputs(shape, num_experts, dtype, **{"r": 8, "out": OUT, **options})
    return inputs._replace(settings=inputs.settings._replace(needs_router_output=False))


def run(name, inputs):
    """The mixture, with gradients where the backend has them."""
    with torch.set_grad_enabled(name in RECORDED):
        assert BY_NAME[name].why_unsupported(inputs) is None, BY_NAME[name].why_unsupported(inputs)
        return compute(BY_NAME[name], inputs)


def loss(mixture):
    """Of output and logits, with weights that differ from entry to entry."""
    output, logits, _ = mixture
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return (output.float() * weights).sum() + 0.1 * logits.square().sum()


def assert_exact(found, inputs):
    expected = compute(Reference(), in_float64(inputs)).output
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- values


@each(ROUTED)
@with_and_without_base
@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)], ids=["", "oneDNN"])
def test_output_is_nobody_elses_and_may_be_changed_in_place(name, fused, onednn, monkeypatch):
    monkeypatch.setattr(library, "onednn_is_faster", lambda: onednn)
    inputs = make(fused=fused)
    before = [tensor.detach().clone() for tensor in leaves(inputs)]
    expected = run(name, inputs).output
    mixture = run(name, inputs)
    output = mixture.output.mul_(2)
    assert torch.equal(output, 2 * expected)
    assert all(torch.equal(tensor, old) for tensor, old in zip(leaves(inputs), before, strict=True))
    if name in RECORDED:
        grads = [torch.autograd.grad(y.sum(), leaves(inputs)) for y in (output, 2 * expected)]
        torch.testing.assert_close(*grads)


@each(ROUTED)
def test_of_equal_logits_the_first_experts_are_chosen(name):
    inputs = make(num_experts=8, top_k=3)
    inputs = inputs._replace(router=torch.zeros(8, IN))
    A, B = inputs.experts_A[:3].detach(), inputs.experts_B[:3].detach()
    update = torch.einsum("...i,eri,ero->...o", inputs.x, A, B) * 1.7 / 3
    mixture = run(name, inputs)
    torch.testing.assert_close(mixture.output, F.linear(inputs.x, inputs.weight) + update, atol=1e-5, rtol=1e-5)
    if mixture.expert_indices is not None:
        assert torch.equal(mixture.expert_indices.sort(0).values, torch.arange(3)[:, None].expand(3, 42))


@each(ROUTED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_with_its_token(name, value):
    inputs = make((10, IN))
    with torch.no_grad():
        inputs.x[3, 5] = value
    assert torch.equal(run(name, inputs).output.isfinite().all(1), torch.arange(10) != 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cpu_train", "grouped"])
def test_gradients_of_experts_do_not_see_what_is_no_number_in_tokens_of_others(name, dtype, value):
    if name == "cpu_train" and not has_vectors(dtype):
        pytest.skip(f"no native products in {dtype} on this processor")
    inputs = make((10, IN), 6, dtype, top_k=1)
    with torch.no_grad():
        inputs.x[3, 5] = value
    output, _, chosen = run(name, inputs)
    gradients = torch.autograd.grad(output[torch.arange(10) != 3].float().sum(), leaves(inputs)[1:3])
    others = [e for e in range(6) if e != chosen[0, 3]]
    assert set(chosen[0].tolist()) & set(others), "no other expert was chosen"
    assert all(gradient[others].isfinite().all() for gradient in gradients)


@each(ROUTED)
def test_a_router_that_is_no_number_is_not_passed_over(name):
    inputs = make((10, IN), top_k=1)
    with torch.no_grad():
        inputs.router[2] = float("nan")
    assert run(name, inputs).output.isnan().all()


@each(ROUTED)
@pytest.mark.parametrize("tokens", [1, 40])
def test_an_expert_is_chosen_once_though_others_are_at_minus_infinity(name, tokens):
    inputs = make((tokens, IN))
    with torch.no_grad():
        inputs.x.copy_(inputs.x.abs() + 1)  # so that products are too large for float32, and below 0
        inputs.router.fill_(-3e38)[1] = 0
    update = inputs.x @ inputs.experts_A[1].t() @ inputs.experts_B[1] * inputs.settings.scaling
    mixture = run(name, inputs)
    torch.testing.assert_close(mixture.output, F.linear(inputs.x, inputs.weight) + update, atol=1e-4, rtol=1e-4)
    if mixture.expert_indices is not None:
        first, second = mixture.expert_indices.sort(0).values
        assert (first != second).all()


@each(RECORDED)
@pytest.mark.parametrize("scaling", [8 / 3, 10 / 3, 16 / 8**0.5])
def test_one_choice_gives_the_router_no_gradient_of_rounding(name, scaling):
    inputs = make((40, IN), top_k=1, scaling=scaling)
    mixture = run(name, inputs)
    (through,) = torch.autograd.grad(mixture.output.sin().sum(), inputs.router, retain_graph=True)
    assert not through.any()
    (of_losses,) = torch.autograd.grad(mixture.output.sin().sum() + mixture.logits.square().sum(), inputs.router)
    expected = 2 * (inputs.x @ inputs.router.t()).t() @ inputs.x
    torch.testing.assert_close(of_losses, expected, atol=1e-3, rtol=1e-4)


@each(ROUTED)
def test_tensors_with_gaps_and_in_another_order(name):
    inputs = make(dropout="decode" not in name, fused=False)
    changed = {}
    for field in ("x", "base_output", "experts_A", "experts_B", "router", "dropout_mask"):
        tensor = getattr(inputs, field)
        if tensor is not None:
            wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
            wide[..., ::2] = tensor.detach()
            swapped = wide.transpose(0, 1).contiguous().transpose(0, 1)
            changed[field] = swapped[..., ::2]
            assert not changed[field].is_contiguous()
    if name == "grouped":
        reason = BY_NAME[name].why_unsupported(inputs._replace(**changed))
        assert reason == "grouped products need contiguous experts"
        del changed["experts_A"], changed["experts_B"]
    assert_exact(run(name, inputs._replace(**changed)).output, inputs)


@each(ROUTED, without=["cpu_train"])  # which says that it needs a token
@with_and_without_base
@pytest.mark.parametrize("shape", [(0, IN), (0, 3, IN), (3, 0, IN)], ids=str)
def test_no_tokens_at_all(name, fused, shape):
    inputs = make(shape, fused=fused)
    mixture = run(name, inputs)
    assert mixture.output.shape == (*shape[:-1], OUT)
    if name in RECORDED:
        assert mixture.logits.shape == (4, 0)
        assert mixture.expert_indices.shape == (2, 0)
        assert [grad.shape for grad in torch.autograd.grad(loss(mixture), leaves(inputs))] == [
            leaf.shape for leaf in leaves(inputs)
        ]


@each(ROUTED, without=["cpu_decode"])
def test_a_wider_base_output_is_not_rounded(name):
    inputs = make(fused=False)
    inputs = inputs._replace(base_output=torch.randn(6, 7, OUT, dtype=torch.float64), experts_B=torch.zeros(4, 8, OUT))
    output = run(name, inputs).output
    assert output.dtype == torch.float64
    assert torch.equal(output, inputs.base_output)


@each(ROUTED, without=["cpu_decode"])
def test_the_sum_with_a_narrower_base_output_is_not_rounded(name):
    """float32 experts on a bfloat16 base without autocast."""
    inputs = make(fused=False)
    inputs = inputs._replace(base_output=inputs.base_output.detach().bfloat16())
    output = run(name, inputs).output
    assert output.dtype == torch.float32
    assert_exact(output, inputs)


@each(["decode", "grouped", "dense", "reference", "gathered"])
@pytest.mark.parametrize("num_tokens", [3, 63, 64, 500])
def test_logits_are_in_float32_for_any_number_of_tokens(name, num_tokens):
    """Also where the whole model was cast to bfloat16, the router with it."""
    inputs = make((num_tokens, IN), 8, torch.bfloat16)
    inputs = inputs._replace(router=inputs.router.detach().bfloat16())
    logits = run(name, inputs).logits
    assert logits.dtype == torch.float32
    expected = inputs.router.double() @ inputs.x.double().t()
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


@each(ROUTED)
@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("x", (42, 64)),
        ("experts_B", (4, 4, OUT)),
        ("experts_B", (3, 8, OUT)),
        ("router", (4, 64)),
        ("base_output", (41, OUT)),
        ("base_output", (42, IN)),
        ("base_output", (42, 2 * OUT)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_end_in_an_error(name, field, shape):
    inputs = make((42, IN), fused=False)._replace(**{field: torch.zeros(shape)})
    with torch.set_grad_enabled(name in RECORDED):
        if BY_NAME[name].why_unsupported(inputs) is not None:
            return  # it is not used, and another one refuses them
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            compute(BY_NAME[name], inputs)


# ---------------------------------------------------------------------- gradients


@each(RECORDED)
@with_and_without_base
def test_without_gradients_the_values_are_the_same(name, fused):
    inputs = make(fused=fused)
    loud = compute(BY_NAME[name], inputs)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            quiet = compute(BY_NAME[name], inputs)
        assert all(torch.equal(one, two) for one, two in zip(quiet, loud, strict=True))
        assert not quiet.output.requires_grad


@each(RECORDED)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_frozen_parts_get_no_gradient_and_others_the_same(name, dropout):
    """All parts but one are trained, then one part alone."""
    inputs = make(dropout=dropout)
    expected = torch.autograd.grad(loss(run(name, inputs)), leaves(inputs))
    parts = set(range(4))
    for trained in [parts - {part} for part in parts] + [{part} for part in parts]:
        for index, leaf in enumerate(leaves(inputs)):
            leaf.requires_grad_(index in trained).grad = None
        loss(run(name, inputs)).backward()
        assert {index for index, leaf in enumerate(leaves(inputs)) if leaf.grad is not None} == trained
        assert all(torch.equal(leaves(inputs)[index].grad, expected[index]) for index in trained)


@each(RECORDED)
def test_experts_nobody_chose_have_gradients_of_zero(name):
    inputs = make((3, IN), 9)
    mixture = run(name, inputs)
    idle = torch.ones(9, dtype=torch.bool).scatter(0, mixture.expert_indices.flatten(), False)
    assert idle.any()
    for gradient in torch.autograd.grad(mixture.output.sin().sum(), leaves(inputs)[1:]):
        assert torch.equal(gradient.flatten(1).norm(dim=1) == 0, idle)


@each(WRITTEN_OUT)
def test_second_derivatives_are_refused(name):
    inputs = make()
    output = run(name, inputs).output
    with pytest.raises(MolaError, match="create_graph"):
        torch.autograd.grad(output.sum(), inputs.x, create_graph=True)


@each(WRITTEN_OUT)
def test_a_mixture_without_gradients_asks_for_none(name):
    with torch.no_grad():
        mixture, saved = BY_NAME[name].forward(make())
    inputs = make()._replace(x=saved.x)
    nothing = BY_NAME[name].backward(inputs, saved.tensors, torch.ones(6, 7, OUT), None, Grads(*[False] * 4))
    assert [grad is None for grad in nothing] == [True] * 4
    assert not mixture.output.requires_grad


@each(RECORDED)
def test_no_wait_for_the_device(name):
    inputs = make((4, 16, IN), 6)
    with CountOperators() as counter:
        loss(run(name, inputs)).backward()
    assert counter.syncs == []

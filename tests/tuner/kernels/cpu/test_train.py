"""Training by native functions: any size, bits, memory, whole models, and where they are used."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from mola.tuner.kernels import dispatch, native
from mola.tuner.kernels.api import NO_ROUTER, NOT_PLAIN, OTHER_ROUTER, MixtureSettings
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.cpu.train import CpuTrain
from mola.tuner.kernels.dense import Dense
from mola.tuner.kernels.dropout import sample_dropout_mask
from mola.tuner.kernels.reference import Reference

from ...counting import CountOperators
from ...models import random_config, tiny_llama, token_batch
from ..inputs import LEAVES, in_float64, leaves, make_inputs
from ..native import TRAINED, TRAINED_OR_SKIPPED, needs_vectors

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the norm
BACKEND = CpuTrain()
dtypes = pytest.mark.parametrize("dtype", TRAINED_OR_SKIPPED)
needs_one = pytest.mark.skipif(not TRAINED, reason="no native products on this processor")


def make(shape, num_experts, dtype, **options):
    return make_inputs(shape, num_experts, dtype, **{"r": 8, "out": 96, "params_dtype": torch.float32, **options})


def run(backend, inputs, *, with_logits=False):
    """Output, logits and gradients."""
    output, logits, _ = compute(backend, inputs)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    loss = (output.double() * weights).sum()
    if with_logits:
        loss = loss + logits.exp().sum()
    return output, logits, *torch.autograd.grad(loss, leaves(inputs))


def check(inputs, *, with_logits=False):
    assert BACKEND.why_unsupported(inputs) is None
    dtype = inputs.settings.dtype
    found, expected = (
        run(backend, each, with_logits=with_logits)
        for backend, each in ((BACKEND, inputs), (Reference(), in_float64(inputs)))
    )
    for index, (name, one, two) in enumerate(zip(("output", "logits", *LEAVES), found, expected, strict=False)):
        limit = TOLERANCE[torch.float32] if name == "logits" else TOLERANCE[dtype]
        if name == "router" and distance(one, two) >= limit:
            # A difference of numbers that can be nearly equal, each of them rounded: no worse than plain PyTorch.
            limit = max(5 * limit, distance(run(Dense(), inputs, with_logits=with_logits)[index], two))
        assert distance(one, two) < limit, f"{name}: {distance(one, two)}"
        assert name not in LEAVES or one.dtype == getattr(inputs, name).dtype, name


def distance(one, two):
    """Relative to the norm; with one expert per token the router's gradient is 0, but for what rounding leaves."""
    return (one.double() - two).norm() / two.norm().clamp(min=1.0)


# ---------------------------------------------------------------------- values


@needs_one
@given(st.integers(1, 70), st.sampled_from([32, 96, 128, 160, 576]), st.sampled_from([32, 192]), st.data())
def test_any_size(num_tokens, in_features, out_features, data):
    num_experts = data.draw(st.integers(2, 12))
    top_k = data.draw(st.integers(1, num_experts))
    r = data.draw(st.sampled_from([3, 17]))  # less than a vector has lanes, and more; each is compiled
    dtype = data.draw(st.sampled_from(TRAINED))
    options = {"r": r, "out": out_features, "top_k": top_k, "scaling": 0.5, "fused": data.draw(st.booleans())}
    inputs = make((num_tokens, in_features), num_experts, dtype, **options)
    if data.draw(st.booleans()):
        inputs = inputs._replace(dropout_mask=sample_dropout_mask(inputs.x, 0.3)[0])
    check(inputs, with_logits=data.draw(st.booleans()))


@dtypes
def test_a_token_does_not_depend_on_its_neighbours(dtype):
    inputs = make((41, 160), 5, dtype, fused=False)
    together = compute(BACKEND, inputs)
    for n in (0, 8, 40):
        alone = compute(BACKEND, inputs._replace(x=inputs.x[n : n + 1], base_output=inputs.base_output[n : n + 1]))
        assert torch.equal(alone.output[0], together.output[n])
        assert torch.equal(alone.logits[:, 0], together.logits[:, n])


@dtypes
def test_matrices_in_another_order_give_the_same_bits(dtype):
    inputs = make((6, 7, 64), 4, dtype, fused=False)
    others = {
        name: getattr(inputs, name).detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for name in LEAVES
    }
    assert not any(other.is_contiguous() for other in others.values())
    for one, two in zip(run(BACKEND, inputs._replace(**others)), run(BACKEND, inputs), strict=True):
        assert torch.equal(one, two)


@dtypes
@pytest.mark.parametrize("shape", [(39, 96), (40, 64), (40, 128)])
def test_a_base_output_that_does_not_fit_is_an_error(shape, dtype):
    inputs = make((40, 64), 4, dtype, fused=False)._replace(base_output=torch.zeros(shape, dtype=dtype))
    with pytest.raises(ValueError, match="base layer's output"):
        compute(BACKEND, inputs)


# ---------------------------------------------------------------------- whole models


def gradients_of_a_model(autocast, checkpointing):
    # All experts are chosen: which ones are would depend on how a hidden state was rounded.
    torch.manual_seed(0)
    config = random_config(num_experts=4, top_k=4, r=8)
    model = get_peft_model(tiny_llama(hidden_size=64, intermediate_size=128), config).train()
    model.enable_input_require_grads()
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**token_batch(rows=4, length=40), use_cache=False).loss
    loss.backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.mark.parametrize(
    "autocast",
    [
        pytest.param(False, marks=needs_vectors(torch.float32)),
        pytest.param(True, marks=needs_vectors(torch.bfloat16)),
    ],
    ids=["", "autocast"],
)
def test_a_model_under_autocast_and_checkpointing(autocast, monkeypatch, force):
    used, select = [], dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda inputs: used.append(select(inputs)) or used[-1])
    found = gradients_of_a_model(autocast, checkpointing=False)
    assert {backend.name for backend in used} == {"cpu_train"}
    assert torch.equal(gradients_of_a_model(autocast, checkpointing=True), found)
    force("dense")
    expected = gradients_of_a_model(autocast=False, checkpointing=False)
    distances = [(each - expected).norm() / expected.norm() for each in (found, gradients_of_a_model(autocast, False))]
    assert used[-1].name == "dense"
    assert distances[0] < (0.05 if autocast else 1e-4)
    assert distances[0] < 1.2 * distances[1] + 1e-4  # no further from the truth than operators of torch


# ---------------------------------------------------------------------- memory


class Fenced:
    """Tensors that lie between numbers which must stay as they are."""

    def __init__(self):
        self.fences = []

    def __call__(self, tensor):
        margin = 64
        memory = torch.full((tensor.numel() + 2 * margin,), 77, dtype=tensor.dtype)
        inside = memory[margin:-margin].view(tensor.shape)
        inside.copy_(tensor)
        self.fences += [memory[:margin], memory[-margin:]]
        return inside

    def stand(self):
        return all(bool((fence == 77).all()) for fence in self.fences)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("r", [3, 8, 17])
@dtypes
def test_nothing_is_written_beside_the_results(dtype, r, joint):
    n, i, o, e, k = 37, 96, 160, 5, 2
    fenced = Fenced()
    x, experts_A, experts_B, router = (fenced(t.detach()) for t in leaves(make((n, i), e, dtype, r=r, out=o)))
    output, gated = fenced(torch.zeros(n, o, dtype=dtype)), fenced(torch.zeros(n, k * (r + r % 2), dtype=dtype))
    if dtype == torch.float32:
        gated = fenced(torch.zeros(n, k * r))
    logits, weights, indices = (
        fenced(t) for t in (torch.zeros(e, n), torch.zeros(k, n), torch.zeros(k, n, dtype=torch.int64))
    )
    tensors = x, x, router, experts_A, experts_B, output, logits, weights, indices, gated
    functions = native.load("jit_train")
    kernel = functions.forward_kernel(dtype, dtype, torch.float32, r)
    kernel(*(t.data_ptr() for t in tensors), n, i, o, e, k, 1.0)
    assert output.any()
    assert gated.any()
    assert fenced.stand()
    dy, total, asked = (
        fenced(t) for t in (torch.randn(n, o, dtype=dtype), torch.zeros(n, i, dtype=dtype), torch.randn(e, n))
    )
    grads = [fenced(torch.zeros_like(t)) for t in (experts_A, experts_B, router)]
    inner = fenced(torch.zeros(e, n, dtype=dtype))
    tensors = dy, x, gated, weights, indices, asked, experts_A, experts_B, router, total, *grads, inner
    kernel = functions.backward_kernel(dtype, torch.float32, r, joint)
    addresses = [t.data_ptr() for t in tensors]
    addresses[5] = 0 if joint else addresses[5]
    kernel(*addresses, n, i, o, e, k, 1.0)
    assert [bool(t.any()) for t in (total, *grads, inner)] == [True, True, True, joint, not joint]
    assert fenced.stand()


@dtypes
def test_few_operators_and_little_kept(dtype):
    inputs, kept = make((4, 16, 64), 6, dtype), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), CountOperators() as forward:
        y = compute(BACKEND, inputs).output
    with CountOperators() as backward:
        y.backward(torch.ones_like(y))
    assert forward.operators <= 20
    assert backward.operators <= 25
    own = {tensor.data_ptr() for tensor in (*leaves(inputs), inputs.weight)}
    per_token = sum(t.nbytes for t in kept if t.data_ptr() not in own) / 64
    assert per_token == 2 * 8 * y.element_size() + 2 * (4 + 8)  # gated; gates and choices


# ---------------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("num_experts", "top_k", "threads", "expected"),
    [(2, 2, 1, True), (8, 2, 1, True), (3, 2, 2, False), (4, 2, 2, True), (8, 2, 4, True), (8, 2, 5, False)],
)
def test_one_thread_must_have_less_to_do(num_experts, top_k, threads, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    reason = BACKEND.why_slower(make((40, 64), num_experts, torch.float32, top_k=top_k))
    assert reason == (None if expected else "slower than dense with so many threads: top_k * threads > num_experts")


SIZES, FIT, FUNCTION = "features in multiples of 32", "do not fit", "no native function for"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": (40, 48)}, SIZES),
        ({"out": 80}, SIZES),
        ({"shape": (0, 64)}, f"{SIZES}, and at least one token"),
        ({"dtype": torch.float64, "params_dtype": torch.float64}, OTHER_ROUTER),
        ({"params_dtype": torch.float16}, f"{FUNCTION} torch.float32"),
        ({"x_dtype": torch.float16}, f"{FUNCTION} torch.float32"),
        ({"dtype": torch.float16}, f"{FUNCTION} torch.float16"),
    ],
    ids=str,
)
def test_sizes_and_dtypes_that_it_does_not_compute(change, reason):
    arguments = {"shape": (40, 64), "num_experts": 4, "dtype": torch.float32, **change}
    assert reason in BACKEND.why_unsupported(make(**arguments))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("router", None, NO_ROUTER),
        ("router", torch.zeros(4, 64, dtype=torch.float64), OTHER_ROUTER),
        ("settings", MixtureSettings(2, 1.0, torch.float32, router="sigmoid"), OTHER_ROUTER),
        ("x", torch.zeros(40, 32), FIT),
        ("experts_B", torch.zeros(4, 4, 96), FIT),
        ("experts_B", torch.zeros(3, 8, 96), FIT),
        ("experts_B", torch.zeros(4, 8, 96, dtype=torch.bfloat16), FIT),
        ("router", torch.zeros(3, 64), FIT),
        ("router", torch.zeros(4, 32), FIT),
        ("x", torch.zeros(40, 64, device="meta"), NOT_PLAIN),
        ("x", torch.zeros(40, 64).as_subclass(type("Other", (torch.Tensor,), {})), NOT_PLAIN),
    ],
)
def test_inputs_that_it_does_not_compute(field, value, reason):
    assert reason in BACKEND.why_unsupported(make((40, 64), 4, torch.float32)._replace(**{field: value}))


def test_what_torch_func_looks_at_it_does_not_compute():
    inputs = make((40, 64), 4, torch.float32)
    reasons = []

    def function(x):
        reasons.append(BACKEND.why_unsupported(inputs._replace(x=x)))
        return x.sum()

    torch.func.grad(function)(inputs.x)
    assert reasons == [NOT_PLAIN]


@dtypes
def test_asking_compiles_nothing(dtype, monkeypatch):
    monkeypatch.setattr(native.load("jit_train"), "_specialize_forward", lambda *formats: pytest.fail("compiled"))
    assert BACKEND.why_unsupported(make((40, 64), 4, dtype, r=5)) is None


def test_without_numba_it_computes_nothing(monkeypatch):
    monkeypatch.setattr(native, "load", lambda name: None)
    assert "or no numba" in BACKEND.why_unsupported(make((40, 64), 4, torch.float32))

"""Chosen experts natively: values and gradients of the formula for every size and format, and where it is used."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mola.tuner.chosen import kernel_for
from mola.tuner.dropout import draw_kept
from mola.tuner.mixture import FrozenLinear, MixtureSettings, add_mixture
from peft import get_peft_model

from mola import MolaError
from mola.tuner import chosen, mixture

from .counting import CountOperators
from .models import random_config, tiny_llama, token_batch

pytest.importorskip("numba", reason="needs numba (the extra `cpu`)")
native_vectors = importlib.import_module("mola.tuner.native_vectors")
native_chosen = importlib.import_module("mola.tuner.native_chosen")
PRODUCTS = [
    pytest.param(
        dtype,
        id=str(dtype),
        marks=pytest.mark.skipif(
            not native_vectors.has_vectors(in_pairs=in_pairs), reason=f"no such vectors for {dtype} here"
        ),
    )
    for dtype, in_pairs in ((torch.float32, False), (torch.bfloat16, True))
]
AVAILABLE = [each.values[0] for each in PRODUCTS if not each.marks[0].args[0]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the norm
NAMES = "output", "logits", "x", "A", "B", "router", "base output"


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)


def make(shape, num_experts, dtype, *, r=8, out=96, fused=True, params=torch.float32, values=None, bias=False):
    """A base, and x, A, B, router (and the base output, where it is apart), which ask for gradients."""
    in_features = shape[-1]
    leaves = [
        (draw(*shape) * in_features**0.5).to(values or dtype),
        draw(num_experts, r, in_features, dtype=params),
        draw(num_experts, r, out, dtype=params, seed=1),
        draw(num_experts, in_features, seed=2),
    ]
    weight = draw(out, in_features, dtype=dtype, seed=3)
    base = FrozenLinear(weight, draw(out, dtype=dtype) if bias else None)
    if not fused:
        base = leaves[0].to(dtype) @ weight.t()
        leaves.append(base)
    for leaf in leaves:
        leaf.requires_grad_()
    return base, leaves


def run(base, leaves, kept, settings, logits_matter=False):
    y, logits, _ = add_mixture(base, *leaves[:4], kept, settings)
    weights = draw(y.numel(), seed=5).view(y.shape) * y.numel() ** 0.5
    loss = (y.float() * weights).sum()
    if logits_matter:
        loss = loss + logits.exp().sum()
    return y, logits, *torch.autograd.grad(loss, leaves)


def formula(base, leaves, kept, settings, logits_matter=False):
    """In float64, all experts, from operators with gradients of their own."""
    x, experts_A, experts_B, router = (leaf.double() for leaf in leaves[:4])
    y = x @ base.weight.double().t() if isinstance(base, FrozenLinear) else leaves[4].double()
    if isinstance(base, FrozenLinear) and base.bias is not None:
        y = y + base.bias.double()
    logits = x.flatten(0, -2) @ router.t()
    top = logits.topk(settings.top_k)
    gates = torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(1))
    dropped = x if kept is None else x * mixture.drop(torch.ones_like(leaves[0]).to(settings.dtype), kept).double()
    hidden = torch.einsum("ni,eji->nej", dropped.flatten(0, -2), experts_A) * gates.unsqueeze(-1)
    y = y + settings.scaling * torch.einsum("nej,ejo->no", hidden, experts_B).view(y.shape)
    weights = draw(y.numel(), seed=5).view(y.shape) * y.numel() ** 0.5
    loss = (y * weights.double()).sum()
    if logits_matter:
        loss = loss + logits.exp().sum()
    return y, logits.t(), *torch.autograd.grad(loss, leaves)


def check(base, leaves, kept, settings, logits_matter=False):
    assert kernel_for(*leaves[:4], settings) is not None, "another way would be tested"
    found = run(base, leaves, kept, settings, logits_matter)
    expected = formula(base, leaves, kept, settings, logits_matter)
    for name, one, two in zip(NAMES, found, expected, strict=False):
        # With one expert per token the router's gradient is 0, but for what rounding leaves.
        distance = (one.double() - two.double()).norm() / two.double().norm().clamp(min=1.0)
        limit = TOLERANCE[torch.float32] if name == "logits" else TOLERANCE[settings.dtype]
        if name == "router":  # a difference of nearly equal numbers, each of them rounded
            limit *= 5
        assert one.dtype == (leaves[NAMES.index(name) - 2].dtype if NAMES.index(name) > 1 else one.dtype), name
        assert distance < limit, f"{name}: {distance}"


@pytest.mark.parametrize("logits_matter", [False, True], ids=["", "router_loss"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("fused", [True, False], ids=["with_base", "base_apart"])
@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(("shape", "num_experts", "top_k"), [((2, 19, 64), 4, 2), ((40, 32), 3, 3), ((5, 160), 9, 1)])
def test_values_and_gradients_follow_the_formula(shape, num_experts, top_k, dtype, fused, dropout, logits_matter):
    base, leaves = make(shape, num_experts, dtype, fused=fused, bias=fused)
    kept = draw_kept(leaves[0], 0.3)[0] if dropout else None
    check(base, leaves, kept, MixtureSettings(top_k, 1.7, dtype), logits_matter)


@pytest.mark.skipif(not AVAILABLE, reason="no such vectors here")
@given(st.integers(1, 70), st.sampled_from([32, 96, 128, 160, 576]), st.sampled_from([32, 192]), st.data())
def test_any_size(num_tokens, in_features, out_features, data):
    num_experts = data.draw(st.integers(2, 12))
    top_k, r = data.draw(st.integers(1, num_experts)), data.draw(st.sampled_from([3, 8, 17]))
    dtype = data.draw(st.sampled_from(AVAILABLE))
    base, leaves = make((num_tokens, in_features), num_experts, dtype, r=r, out=out_features)
    check(base, leaves, None, MixtureSettings(top_k, 0.5, dtype), data.draw(st.booleans()))


FORMATS = [  # of what the router sees, of products, of A and B
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
]


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="no such vectors here for bfloat16")
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize(("values", "products", "params"), FORMATS, ids=str)
def test_formats_that_differ(values, products, params, dropout):
    base, leaves = make((33, 64), 5, products, params=params, values=values)
    kept = draw_kept(leaves[0], 0.3)[0] if dropout else None
    check(base, leaves, kept, MixtureSettings(2, 1.7, products))


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_base_output_of_a_wider_format_is_not_rounded(dtype):
    _, leaves = make((7, 64), 4, dtype)
    result = draw(7, 96)
    settings = MixtureSettings(2, 1.0, dtype)
    output = add_mixture(result, *leaves, None, settings).output
    assert output.dtype == torch.float32
    leaves[2].data.zero_()
    assert torch.equal(add_mixture(result, *leaves, None, settings).output, result)


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_without_gradients_the_values_are_the_same(dtype):
    base, leaves = make((50, 64), 6, dtype)
    settings = MixtureSettings(2, 1.0, dtype)
    with torch.no_grad():
        quiet = add_mixture(base, *leaves, None, settings)
    loud = add_mixture(base, *leaves, None, settings)
    assert all(torch.equal(one, two) for one, two in zip(quiet, loud, strict=True))


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_a_token_does_not_depend_on_its_neighbours(dtype):
    _, leaves = make((41, 160), 5, dtype)
    settings, result = MixtureSettings(2, 1.0, dtype), draw(41, 96, dtype=dtype)
    together = add_mixture(result, *leaves, None, settings)
    for n in (0, 8, 40):  # with gradients, so that few tokens take this way too
        alone = add_mixture(result[n : n + 1], leaves[0][n : n + 1], *leaves[1:], None, settings)
        assert torch.equal(alone.output[0], together.output[n])
        assert torch.equal(alone.logits[:, 0], together.logits[:, n])


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_experts_nobody_chose_have_gradients_of_zero(dtype):
    base, leaves = make((9, 64), 6, dtype)
    leaves[0].data.abs_()
    leaves[3].data.abs_()
    leaves[3].data[2] = leaves[3].data[5] = -1.0  # the smallest logits of all
    *_, grad_A, grad_B, grad_router = run(base, leaves, None, MixtureSettings(2, 1.0, dtype))
    for gradient in (grad_A, grad_B, grad_router):
        assert torch.equal(gradient.flatten(1).norm(dim=1) == 0, torch.tensor([0, 0, 1, 0, 0, 1]).bool())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_what_is_no_number_stays_with_its_token_and_experts(dtype, value):
    base, leaves = make((10, 64), 4, dtype)
    settings = MixtureSettings(1, 1.0, dtype)
    chosen_before = add_mixture(base, *leaves, None, settings).expert_indices[0]
    leaves[0].data[3, 5] = value
    y, _, chosen_now = add_mixture(base, *leaves, None, settings)
    assert torch.equal(y.isfinite().all(1), torch.arange(10) != 3)
    grad_A, grad_B = torch.autograd.grad(y[torch.arange(10) != 3].float().sum(), leaves[1:3])
    others = [e for e in range(4) if e != chosen_now[0, 3]]
    assert set(chosen_before.tolist()) & set(others), "no other expert was chosen"
    assert grad_A[others].isfinite().all()
    assert grad_B[others].isfinite().all()


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("frozen", range(4))
def test_frozen_parts_get_no_gradient_and_others_the_same(frozen, dtype):
    base, leaves = make((9, 64), 4, dtype)
    settings = MixtureSettings(2, 1.0, dtype)
    expected = torch.autograd.grad(add_mixture(base, *leaves, None, settings).output.float().sum(), leaves)
    leaves[frozen].requires_grad_(False)
    add_mixture(base, *leaves, None, settings).output.float().sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [index == frozen for index in range(4)]
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_gradients_of_the_logits_alone(dtype):
    """As of a balance loss whose output nobody uses."""
    base, leaves = make((2, 5, 64), 4, dtype)
    _, logits, _ = add_mixture(base, *leaves, None, MixtureSettings(2, 1.0, dtype))
    grad_x, grad_router = torch.autograd.grad((logits**2).sum(), [leaves[0], leaves[3]])
    rows = leaves[0].flatten(0, -2).double()
    inner = 2 * rows @ leaves[3].double().t()
    for found, expected in ((grad_x.flatten(0, -2), inner @ leaves[3].double()), (grad_router, inner.t() @ rows)):
        assert (found.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_second_derivatives_are_refused(dtype):
    base, leaves = make((4, 64), 4, dtype)
    output = add_mixture(base, *leaves, None, MixtureSettings(2, 1.0, dtype)).output
    with pytest.raises(MolaError, match="create_graph"):
        torch.autograd.grad(output.float().sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_input_with_gaps_and_matrices_in_another_order(dtype):
    base, leaves = make((6, 7, 64), 4, dtype)
    settings = MixtureSettings(2, 1.0, dtype)
    expected = run(base, leaves, None, settings)
    others = [leaf.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for leaf in leaves]
    assert not any(other.is_contiguous() for other in others)
    for name, one, two in zip(NAMES, run(base, others, None, settings), expected, strict=False):
        assert torch.equal(one, two), name


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


AUTOCAST = [pytest.param(on, marks=PRODUCTS[on].marks) for on in (False, True)]


@pytest.mark.parametrize("autocast", AUTOCAST, ids=["", "autocast"])
def test_a_model_under_autocast_and_checkpointing(autocast, monkeypatch):
    used = []
    monkeypatch.setattr(mixture, "kernel_for", lambda *arguments: used.append(kernel_for(*arguments)) or used[-1])
    found = gradients_of_a_model(autocast, checkpointing=False)
    assert used
    assert None not in used
    assert torch.equal(gradients_of_a_model(autocast, checkpointing=True), found)
    monkeypatch.setattr(mixture, "kernel_for", lambda *_: None)
    expected = gradients_of_a_model(autocast=False, checkpointing=False)
    distances = [(each - expected).norm() / expected.norm() for each in (found, gradients_of_a_model(autocast, False))]
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
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_nothing_is_written_beside_the_results(dtype, r, joint):
    n, i, o, e, k = 37, 96, 160, 5, 2
    fenced = Fenced()
    _, (x, experts_A, experts_B, router) = make((n, i), e, dtype, r=r, out=o)
    x, experts_A, experts_B, router = (fenced(t.detach()) for t in (x, experts_A, experts_B, router))
    output, gated = fenced(torch.zeros(n, o, dtype=dtype)), fenced(torch.zeros(n, k * (r + r % 2), dtype=dtype))
    if dtype == torch.float32:
        gated = fenced(torch.zeros(n, k * r))
    logits, weights, indices = (
        fenced(t) for t in (torch.zeros(e, n), torch.zeros(k, n), torch.zeros(k, n, dtype=torch.int64))
    )
    tensors = x, x, router, experts_A, experts_B, output, logits, weights, indices, gated
    kernel = native_chosen.forward_kernel(dtype, dtype, torch.float32, r)
    kernel(*(t.data_ptr() for t in tensors), n, i, o, e, k, 1.0)
    assert output.any()
    assert gated.any()
    assert fenced.stand()
    dy, total, asked = fenced(draw(n, o, dtype=dtype)), fenced(torch.zeros(n, i, dtype=dtype)), fenced(draw(e, n))
    grads = [fenced(torch.zeros_like(t)) for t in (experts_A, experts_B, router)]
    inner = fenced(torch.zeros(e, n, dtype=dtype))
    tensors = dy, x, gated, weights, indices, asked, experts_A, experts_B, router, total, *grads, inner
    kernel = native_chosen.backward_kernel(dtype, torch.float32, r, joint)
    addresses = [t.data_ptr() for t in tensors]
    addresses[5] = 0 if joint else addresses[5]
    kernel(*addresses, n, i, o, e, k, 1.0)
    assert [bool(t.any()) for t in (total, *grads, inner)] == [True, True, True, joint, not joint]
    assert fenced.stand()


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_few_operators_no_wait_and_little_kept(dtype):
    base, leaves = make((4, 16, 64), 6, dtype)
    settings, kept = MixtureSettings(2, 1.0, dtype), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        CountOperators() as forward,
    ):
        y = add_mixture(base, *leaves, None, settings).output
    with CountOperators() as backward:
        y.backward(torch.ones_like(y))
    assert forward.syncs == backward.syncs == []
    assert forward.operators <= 20
    assert backward.operators <= 25
    own = {leaf.data_ptr() for leaf in leaves} | {base.weight.data_ptr()}
    per_token = sum(t.nbytes for t in kept if t.data_ptr() not in own) / 64
    assert per_token == 2 * 8 * y.element_size() + 2 * (4 + 8)  # gated; gates and choices


# ---------------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("num_experts", "top_k", "threads", "expected"),
    [(2, 2, 1, True), (8, 2, 1, True), (3, 2, 2, False), (4, 2, 2, True), (8, 2, 4, True), (8, 2, 5, False)],
)
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_one_thread_must_have_less_to_do(dtype, num_experts, top_k, threads, expected, monkeypatch):
    _, leaves = make((40, 64), num_experts, dtype)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert (kernel_for(*leaves, MixtureSettings(top_k, 1.0, dtype)) is not None) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (40, 48)},
        {"out": 80},
        {"shape": (0, 64)},
        {"params": torch.float64, "values": torch.float64, "dtype": torch.float64},
        {"params": torch.float16},
    ],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_other_sizes_and_formats_go_another_way(change):
    dtype = change.get("dtype", torch.float32)
    _, leaves = make(**{"shape": (40, 64), "num_experts": 4, "dtype": dtype, **change})
    assert kernel_for(*leaves, MixtureSettings(2, 1.0, dtype)) is None


@pytest.mark.parametrize("dtype", PRODUCTS)
def test_a_router_of_another_format_goes_another_way(dtype):
    _, leaves = make((40, 64), 4, dtype)
    leaves[3] = leaves[3].detach().double()
    assert kernel_for(*leaves, MixtureSettings(2, 1.0, dtype)) is None


def test_what_torch_func_looks_at_goes_another_way():
    _, leaves = make((40, 64), 4, torch.float32)
    seen = []

    def function(x):
        seen.append(kernel_for(x, *leaves[1:], MixtureSettings(2, 1.0, torch.float32)))
        return x.sum()

    torch.func.grad(function)(leaves[0])
    assert seen == [None]


@pytest.mark.parametrize(
    ("which", "shape"), [(0, (40, 32)), (2, (4, 4, 96)), (2, (3, 8, 96)), (3, (3, 64)), (3, (4, 32))]
)
def test_matrices_that_do_not_fit_are_an_error_of_torch(which, shape):
    _, leaves = make((40, 64), 4, torch.float32)
    leaves[which] = draw(*shape)
    settings = MixtureSettings(2, 1.0, torch.float32)
    assert kernel_for(*leaves, settings) is None
    with pytest.raises(RuntimeError):
        add_mixture(draw(40, 96), *leaves, None, settings)


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("shape", [(39, 96), (40, 64), (40, 128)])
def test_a_base_output_that_does_not_fit_is_an_error(shape, dtype):
    _, leaves = make((40, 64), 4, dtype)
    with pytest.raises(ValueError, match="base layer's output"):
        add_mixture(draw(*shape, dtype=dtype), *leaves, None, MixtureSettings(2, 1.0, dtype))


PROCESSORS = [
    ("+avx512f,+avx512bw,+avx512bf16,-amx-bf16", 22, True, True),
    ("+avx512f,+avx512bw,+avx512bf16,+amx-bf16", 22, True, False),  # libraries use its matrix instructions
    ("+avx512f,+avx512bw,+avx512bf16,-amx-bf16", 15, True, False),  # which has another name for bfloat16
    ("+avx512f,+avx512bw,-avx512bf16,-amx-bf16", 22, True, False),
    ("+avx512f,-avx512bw", 22, False, False),
    ("+avx2,-avx512f", 22, False, False),
    ("+neon", 22, False, False),
    ("", 22, False, False),
]


@pytest.mark.parametrize(("features", "llvm", "single", "half"), PROCESSORS)
def test_processors(features, llvm, single, half, monkeypatch):
    monkeypatch.setattr(native_vectors, "_features", lambda: features.split(","))
    monkeypatch.setattr(native_vectors.llvm, "llvm_version_info", (llvm, 0, 0))
    assert native_vectors.has_vectors(in_pairs=False) == single
    assert native_vectors.has_vectors(in_pairs=True) == half


def test_without_numba_it_goes_another_way(monkeypatch):
    _, leaves = make((40, 64), 4, torch.float32)
    monkeypatch.setattr(chosen, "import_native", lambda name: None)
    assert kernel_for(*leaves, MixtureSettings(2, 1.0, torch.float32)) is None


SCRIPT = """
import torch
from tests.tuner.test_chosen import AVAILABLE, MixtureSettings, draw_kept, make, run
for dtype in AVAILABLE:
    for matter in (False, True):
        base, leaves = make((37, 96), 5, dtype, r=3)
        for value in run(base, leaves, None, MixtureSettings(2, 1.0, dtype), matter):
            print(value.double().flatten().view(torch.int64).sum().item(), value.double().norm().item())
"""


@pytest.mark.skipif(not AVAILABLE, reason="no such vectors here")
def test_code_just_compiled_and_code_from_the_disk_make_the_same_bits(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert len(outputs[0].splitlines()) == 12 * len(AVAILABLE)
    assert outputs[0] == outputs[1]

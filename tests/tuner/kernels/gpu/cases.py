"""The Triton backend: on a GPU, or in Triton's interpreter on the CPU. `test_triton` runs both in a process of its own,
since Triton reads at its import whether it interprets."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mola import MolaError
from mola.insight.kernels import kernel_choices
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dense import Dense
from mola.tuner.kernels.dispatch import cast_float32_input, mixture, select
from mola.tuner.kernels.dropout import drop, is_gpu_seed, sample_dropout_mask
from mola.tuner.kernels.gpu import backend as backend_module
from mola.tuner.kernels.gpu import first_use, launch
from mola.tuner.layer import ExpertSettings, MolaLinear
from mola.tuner.router_statistics import RouterOutput, router_statistics
from mola.tuner.routing import top_k_softmax
from tests.grids import slow

from .. import test_parity as parity
from ..inputs import as_leaves, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = backend_module.Triton()
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3}


def on_device(inputs):
    moved = {name: t.to(DEVICE) for name, t in inputs._asdict().items() if torch.is_tensor(t)}
    return as_leaves(inputs._replace(**moved))


def make(shape=(3, 7, 24), num_experts=5, dtype=torch.bfloat16, **options):
    return on_device(make_inputs(shape, num_experts, dtype, **{"r": 3, "out": 10, **options}))


@pytest.fixture(autouse=True)
def tried_anew(monkeypatch):
    """Nothing is known of a kind of call, and nothing is packed."""
    monkeypatch.setattr(first_use, "_found", {})
    monkeypatch.setattr(backend_module, "_packed_of", type(backend_module._packed_of)())


@pytest.fixture
def trusted(monkeypatch):
    """Kernels are not tried first: the test looks at them itself."""
    monkeypatch.setattr(first_use, "why_wrong", lambda backend, inputs: None)


# ---------------------------------------------------------------------- values


def rows():
    """Sizes, dtypes, top_k, dropout, with and without the base; half of them for the night."""
    found = []
    for row in parity.grid(["triton"], dropout=("none", "booleans", "sampled"), fused=(True, False)):
        dtype, top_k, dropout, fused = row.values[2:]
        is_quick = dropout != "booleans" and (dtype is torch.bfloat16 or (top_k, fused) == (2, True))
        found.append(pytest.param(*row.values[1:], id=row.id, marks=() if is_quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("sizes", "dtype", "top_k", "dropout", "fused"), rows())
def test_values_and_gradients(sizes, dtype, top_k, dropout, fused, trusted):
    shape, out, num_experts, r = sizes
    inputs = make(shape, num_experts, dtype, r=r, out=out, top_k=top_k, fused=fused, bias=True)
    inputs = parity.with_mask(inputs, dropout)
    assert (dropout == "sampled") == (inputs.dropout_mask is not None and is_gpu_seed(inputs.dropout_mask))
    assert TRITON.why_unsupported(inputs) is None
    with launch.poisoned():
        found = parity.run(TRITON, inputs)
    assert None not in found.values()
    parity.check(found, parity.expected_of(inputs, parity.run), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", ["none", "sampled"])
def test_adapters_in_float32(dtype, dropout, trusted):
    """As `mola train` keeps them, under autocast."""
    inputs = parity.with_mask(make(dtype=dtype, params_dtype=torch.float32), dropout)
    found = parity.run(TRITON, inputs)
    parity.check(found, parity.expected_of(inputs, parity.run), TOLERANCE[dtype])
    assert found["gradient of experts_A"].dtype == torch.float32


@pytest.mark.parametrize(("num_experts", "r", "top_k"), [(2, 1, 1), *slow((64, 4, 6)), (16, 16, 16), (7, 40, 3)])
@pytest.mark.parametrize("num_tokens", [1, 130])
def test_other_sizes(num_experts, r, top_k, num_tokens, trusted):
    inputs = make((num_tokens, 32), num_experts, r=r, top_k=top_k)
    with launch.poisoned():
        found = parity.run(TRITON, inputs)
    parity.check(found, parity.expected_of(inputs, parity.run), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_those_of_float32(dtype, trusted):
    """Not of the rounded weight, with which some tokens choose other experts."""
    inputs = make((2048, 64), 8, dtype, r=1, top_k=2)
    with torch.no_grad():
        found = compute(TRITON, inputs)
    exact = inputs.x.double() @ inputs.router.double().t()
    rounded = inputs.x.double() @ inputs.router.to(dtype).double().t()
    error = (found.logits.t().double() - exact).abs().max()
    assert error < 3e-6 < 1e-3 < (rounded - exact).abs().max() * 10
    expected = top_k_softmax((inputs.x.float() @ inputs.router.t()), 2).expert_indices
    assert torch.equal(found.expert_indices.t().sort(1).values, expected.sort(1).values)


def gates_of(logits, top_k):
    """Gates, and choices, of logits that are given as the first part of what the router's product gives."""
    num_experts, num_tokens = logits.shape
    products = torch.cat([logits, torch.zeros(2 * num_experts, num_tokens)]).to(DEVICE)
    hidden = torch.ones(num_experts, num_tokens, device=DEVICE)
    with launch.poisoned():
        return launch.gates_forward(products, hidden, num_experts, top_k, 1.0, torch.bfloat16)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_choices_are_those_of_the_router_in_torch(top_k):
    """The first of equal ones, NaN before all, infinities."""
    columns = [
        *([0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 2.0], [3.0, 1.0, 3.0, 1.0], [-1.0, 4.0, NAN, 5.0]),
        *([NAN, 1.0, NAN, NAN], [-INF, -INF, -INF, -INF], [INF, 0.0, INF, 1.0], [-INF, 0.5, -INF, -INF]),
    ]
    logits = torch.tensor(columns).t().contiguous()
    found, expected = gates_of(logits, top_k), top_k_softmax(logits.to(DEVICE), top_k, 0)
    assert torch.equal(found.expert_indices, expected.expert_indices)
    gates = found.weights.gather(0, expected.expert_indices)
    torch.testing.assert_close(gates, expected.routing_weights, equal_nan=True)
    torch.testing.assert_close(found.logits.cpu(), logits, equal_nan=True)
    others = found.weights.scatter(0, expected.expert_indices, 0.0)
    assert not others.any()


# ---------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [*slow(0.0), 0.05, *slow(0.5, 0.999)])
def test_the_share_that_is_dropped(p):
    x = torch.ones(150, 200, dtype=torch.bfloat16, device=DEVICE)
    torch.manual_seed(0)
    seed, keep_probability = sample_dropout_mask(x, p)
    assert is_gpu_seed(seed)
    assert keep_probability == pytest.approx(1 - p, abs=1e-5)
    kept = drop(x, seed)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    share = kept.float().mean().item()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-9
    assert torch.equal(drop(x, seed), kept)
    if 0 < p < 0.9:
        other = drop(x, sample_dropout_mask(x, p)[0])
        both = ((kept == 0) & (other == 0)).float().mean().item()
        assert abs(both - p * p) < 5 * p / x.numel() ** 0.5
        by_row, by_column = ((kept == 0).float().mean(dim) for dim in (1, 0))
        for means, count in ((by_row, 200), (by_column, 150)):
            assert (means - p).abs().max() < 6 * (p * (1 - p) / count) ** 0.5


def test_neighbours_are_dropped_independently():
    x = torch.ones(1 << 16, device=DEVICE)
    torch.manual_seed(1)
    dropped = (drop(x, sample_dropout_mask(x, 0.3)[0]) == 0).float() - 0.3
    for lag in (1, 2, 3, 4, 64, 256, 512, 1024, 4096):
        correlation = (dropped[lag:] * dropped[:-lag]).mean().item() / 0.21
        assert abs(correlation) < 5 / x.numel() ** 0.5, lag


def test_too_many_elements_for_a_seed_get_booleans():
    assert launch.sample_seed(torch.empty(2**32, device="meta"), 0.1) is None


# ---------------------------------------------------------------------- first use


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_wide", [False, True], ids=["", "experts in float32"])
def test_it_is_tried_once_and_then_used(dtype, is_wide):
    params = torch.float32 if is_wide else dtype
    inputs = make(dtype=dtype, params_dtype=params)
    assert TRITON.why_unsupported(inputs) is None
    (key,) = first_use._found
    assert key == (inputs.x.device, dtype, params, 5, 3, 2)
    assert select(inputs).name == "triton"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_may_be_tried_first_where_nothing_is_recorded(mode):
    with mode(), torch.autocast(DEVICE, torch.bfloat16):
        assert TRITON.why_unsupported(make()) is None


def test_it_may_be_tried_first_within_a_checkpointed_layer():
    """Tensors that the trial saves are none of the layer's, which is computed again without it."""
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)

    def layer(x):
        assert TRITON.why_unsupported(make()) is None
        return x.exp().sin()

    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, (x.exp().cos() * x.exp()).detach())
    assert len(first_use._found) == 1


def wrong_gates(original):
    """Gates that are right but for the last token."""

    def wrong(*arguments):
        found = original(*arguments)
        found.gated[:, -1] *= 1.5
        return found

    return wrong


def broken(*arguments):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("gates_forward", wrong_gates, "its output differs from the reference"),
        ("gates_backward", lambda original: lambda *a: original(*a).neg_(), "differs from the reference by"),
        (
            "drop",
            lambda original: lambda rows, seed, *total: original(rows, seed, *total) if total else rows,
            "differs from",
        ),
        ("pack", lambda original: broken, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_wrong_kernel_is_caught_and_never_used(part, change, reason, monkeypatch, caplog):
    monkeypatch.setattr(launch, part, change(getattr(launch, part)))
    inputs = make()
    monkeypatch.setitem(launch._dropout_works, inputs.x.device, True)  # it is looked at by itself, too
    with caplog.at_level(logging.WARNING):
        assert select(inputs).name == "dense"
        found = TRITON.why_unsupported(inputs)
    assert reason in found
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"The kernel triton is not used on {inputs.x.device}: {found}."
    monkeypatch.setattr(backend_module.Triton, "forward", lambda *a: pytest.fail("used"))
    layer = MolaLinear(nn.Linear(24, 10), "default", ExpertSettings(3, 5, 2, 16.0)).to(DEVICE, torch.bfloat16)
    assert layer(inputs.x.detach()).shape == (3, 7, 10)
    assert select(inputs).name == "dense"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(broken, "RuntimeError: no kernel image"), (lambda rows, seed, *total: rows, "it keeps 100% instead of 75 %")],
)
def test_dropout_that_does_not_work_is_left_to_torch(wrong, reason, monkeypatch, caplog):
    """The kernel is that of the dense backend too, in any dtype and on any card."""
    monkeypatch.setattr(launch, "_dropout_works", {})
    monkeypatch.setattr(launch, "drop", wrong)
    x = torch.ones(3, 5, device=DEVICE)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            mask, keep_probability = sample_dropout_mask(x, 0.3)
            assert mask.dtype is torch.bool
            assert abs(keep_probability - 0.7) < 1e-4
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"Dropout of Triton is not used on {x.device}: {reason}" in line


def test_the_trial_leaves_random_numbers_as_they_are():
    inputs = make()
    torch.manual_seed(3)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    TRITON.why_unsupported(inputs)
    assert torch.equal(torch.rand(3, device=DEVICE), expected)


def test_forced(force):
    force("triton")
    assert select(make()).name == "triton"
    with pytest.raises(MolaError, match="MOLA_KERNEL=triton cannot compute.*bfloat16 or float16, here torch.float32"):
        select(make(dtype=torch.float32))


# ---------------------------------------------------------------------- weights are packed once


@pytest.fixture
def packings(monkeypatch, trusted):
    calls, original = [], launch.pack
    monkeypatch.setattr(launch, "pack", lambda *a: calls.append(a) or original(*a))
    return calls


def test_frozen_weights_are_packed_once(packings):
    inputs = make((4, 24))
    for each in (inputs.experts_A, inputs.experts_B, inputs.router):
        each.requires_grad_(False)
    with torch.no_grad():
        first = compute(TRITON, inputs).output
        again = compute(TRITON, inputs).output
        assert torch.equal(first, again)
        assert len(packings) == 1
        inputs.router.mul_(1.5)  # which counts a version
        changed = compute(TRITON, inputs).output
    assert len(packings) == 2
    assert not torch.equal(changed, first)
    parity.check(
        {"output": changed}, {"output": parity.expected_of(inputs, parity.run)["output"]}, TOLERANCE[torch.bfloat16]
    )


@pytest.mark.parametrize("name", ["experts_A", "experts_B", "router"])
def test_what_training_changed_is_packed_anew_though_no_version_tells(name, packings):
    """As optimisers do that write to `.data`."""
    inputs = make((4, 24))
    with torch.no_grad():
        before = compute(TRITON, inputs).output
    compute(TRITON, inputs).output.sum().backward()
    getattr(inputs, name).data.mul_(3.0)
    with torch.no_grad():
        after = compute(TRITON, inputs).output
    assert len(packings) == 3
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", ["experts_A", "experts_B", "router"])
def test_weights_that_are_trained_are_packed_every_time(name, packings):
    """Under a compiler and with jitter others train them, and fused optimisers change no version."""
    inputs = make((4, 24))
    with torch.no_grad():
        before = compute(TRITON, inputs).output
        getattr(inputs, name).data.mul_(3.0)
        after = compute(TRITON, inputs).output
    assert len(packings) == 2
    assert not torch.equal(before, after)


def test_training_by_another_backend_is_followed_by_new_packing(packings):
    """Nothing but `train` tells of it: a fused optimiser changes no version."""
    inputs = make((4, 24))
    for each in (inputs.experts_A, inputs.experts_B, inputs.router):
        each.requires_grad_(False)
    with torch.no_grad():
        compute(TRITON, inputs)
        compute(TRITON, inputs)
        assert len(packings) == 1
        backend_module.drop_cached_copies([inputs.experts_A])
        compute(TRITON, inputs)
    assert len(packings) == 2


def test_in_inference_mode(packings):
    with torch.inference_mode():
        inputs = make((4, 24))
        assert compute(TRITON, inputs).output.shape == (4, 10)


# ---------------------------------------------------------------------- in a layer


def counted(kind, calls):
    original = kind.forward
    return lambda *arguments: calls.append(kind.name) or original(*arguments)


def test_an_input_in_float32_under_autocast_is_cast_once(trusted, monkeypatch):
    """As LayerNorm gives it on a GPU."""
    calls = []
    monkeypatch.setattr(backend_module.Triton, "forward", counted(backend_module.Triton, calls))
    inputs = make((4, 24))
    wide = inputs._replace(x=inputs.x.detach().float().requires_grad_())
    with torch.autocast(DEVICE, torch.bfloat16):
        found = mixture(wide).output
    assert len(calls) == 1
    torch.testing.assert_close(found, compute(TRITON, inputs).output, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert wide.x.grad.dtype is torch.float32


def test_what_is_told_under_autocast_is_what_computes(trusted):
    inputs = make((4, 24), params_dtype=torch.float32)
    wide = inputs._replace(x=inputs.x.detach().float().requires_grad_())
    with torch.autocast(DEVICE, torch.bfloat16):
        (told,) = kernel_choices([("training", wide)])
        assert told.backend == select(cast_float32_input(wide)).name == "triton"
        alone = wide._replace(router=None, experts_A=wide.experts_A[:1], experts_B=wide.experts_B[:1])
        assert cast_float32_input(alone).x is alone.x  # one expert is PEFT's LoRA, which leaves that to autocast


@pytest.mark.parametrize("adapters", [*slow(torch.float32), torch.bfloat16], ids=str)
def test_training_beside_the_dense_backend(adapters, force, monkeypatch):
    """Some steps with dropout, a balance loss and a decode in between end where operators of torch end."""
    losses = {}
    for name in ("triton", "dense"):
        torch.manual_seed(0)
        settings = ExpertSettings(3, 4, 2, 16.0, lora_dropout=0.1, init_lora_weights=False)
        layer = MolaLinear(nn.Linear(24, 10), "default", settings)
        layer.base_layer.bfloat16().requires_grad_(False)
        for part in (layer.mola_A, layer.mola_B):
            part.to(adapters)
        layer.to(DEVICE)
        calls = []
        for kind in (backend_module.Triton, Dense):
            monkeypatch.setattr(kind, "forward", counted(kind, calls))
        force(name)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        generator = torch.Generator().manual_seed(1)
        losses[name] = []
        for _ in range(6):
            x = torch.randn(40, 24, generator=generator).to(DEVICE, torch.bfloat16)
            torch.manual_seed(7)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=adapters == torch.float32):
                loss = (layer(x).float() - x.float()[:, :10]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=adapters == torch.float32):
                layer.eval()(x[:1])
            layer.train()
            losses[name].append(loss.item())
        assert set(calls) == {name}
        monkeypatch.undo()
    assert losses["triton"] == pytest.approx(losses["dense"], rel=2e-2)
    assert losses["triton"][-1] < losses["triton"][0]


def test_router_losses_read_its_logits(trusted):
    inputs = make()
    _, logits, indices = compute(TRITON, inputs)
    statistics = router_statistics(RouterOutput(logits.t(), indices.t()))
    assert statistics.expert_counts.sum() == 2 * 21
    statistics.z_sum.backward()
    assert inputs.router.grad.abs().sum() > 0

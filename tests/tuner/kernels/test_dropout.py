"""Dropout masks, of booleans or from a seed: shares, independence, and the same gradients by either."""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode

from mola.tuner.kernels import dropout
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dispatch import BACKENDS
from mola.tuner.kernels.dropout import _sample_booleans, drop, keep_probability, sample_dropout_mask
from tests.grids import slow

from ..models import random_config, tiny_llama
from .inputs import leaves, make_inputs
from .native import needs_numba, needs_vectors

SIZE = 1000, 1001


def draw_mask(p):
    x = torch.ones(SIZE)
    seed, probability = sample_dropout_mask(x, p)
    assert seed.dtype == torch.int32
    assert seed.numel() == 3
    dropped = drop(x, seed)
    assert ((dropped == 0) | (dropped == 1)).all()
    return dropped.bool(), probability


def share(mask):
    return mask.double().mean().item()


@needs_numba
@pytest.mark.parametrize("p", [1e-4, 1 / 3, *slow(0.05, 0.5, 0.9)])
def test_shares(p):
    torch.manual_seed(0)
    mask, probability = draw_mask(p)
    assert abs(probability - (1 - p)) < 1e-9
    error = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(share(mask) - probability) < 5 * error
    for step in (2, 4, 16, 1001) if p > 0.01 else ():  # every lane of a vector, every column
        lanes = mask.flatten()[: mask.numel() // step * step].view(-1, step).double().mean(0)
        assert abs(lanes - probability).max() < 6 * error * step**0.5


@needs_numba
@pytest.mark.parametrize("p", [0.0, 1 - 1e-12])
def test_ends(p):
    mask, probability = draw_mask(p)
    assert probability == pytest.approx(1 - p, abs=1e-9)
    assert mask.all() if p == 0 else share(mask) < 1e-5


@needs_numba
def test_what_is_kept_does_not_depend_on_neighbours_or_on_the_last_mask():
    torch.manual_seed(1)
    (first, _), (second, _) = draw_mask(0.3), draw_mask(0.3)
    for shift in (0, 1, 2, 3, 16, 64, 576, 1001):
        pairs = [(first, second)] if shift == 0 else [(first, first), (first, second), (second, first)]
        for one, other in pairs:
            a, b = one.flatten()[shift:].double(), other.flatten()[: one.numel() - shift].double()
            correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
            assert abs(correlation) < 5 / a.numel() ** 0.5, shift


@needs_numba
def test_seeds_that_differ_in_one_bit_draw_other_masks():
    x = torch.ones(SIZE)
    for word in (0, 1):
        for bit in (0, 7, 31):
            seed = torch.tensor([12345, 678, 1 << 30], dtype=torch.int32)
            first = drop(x, seed).flatten()
            seed[word] ^= -(1 << 31) if bit == 31 else 1 << bit
            second = drop(x, seed).flatten()
            assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 5 / x.numel() ** 0.5


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_one_seed_keeps_the_same_in_every_dtype_and_shape(dtype):
    torch.manual_seed(2)
    x = torch.randn(30, 41)
    seed, _ = sample_dropout_mask(x, 0.3)
    mask = drop(torch.ones_like(x), seed).bool()
    assert torch.equal(drop(x.to(dtype), seed), torch.where(mask, x.to(dtype), 0.0))
    assert torch.equal(drop(x.view(5, 6, 41), seed), torch.where(mask, x, 0.0).view(5, 6, 41))
    assert torch.equal(drop(x.t().contiguous().t(), seed), torch.where(mask, x, 0.0))
    assert torch.equal(drop(torch.full_like(x, -0.0), seed), torch.zeros_like(x))


@pytest.fixture(params=[pytest.param(True, marks=needs_numba), False], ids=["seed", "booleans"])
def kind(request, monkeypatch):
    """Either kind of mask."""
    if not request.param:
        monkeypatch.setattr(dropout, "_drop_kernel", lambda itemsize: None)
    return torch.int32 if request.param else torch.bool


@pytest.mark.parametrize("p", [1 / 3, *slow(0.05, 0.5, 0.9)])
@pytest.mark.parametrize("shape", [SIZE, (3,), (7, 5)])
def test_booleans_keep_the_share_they_say(p, shape, monkeypatch):
    monkeypatch.setattr(dropout, "_drop_kernel", lambda itemsize: None)
    torch.manual_seed(0)
    x = torch.empty(shape)
    mask, probability = sample_dropout_mask(x, p)
    assert mask.shape == x.shape
    assert mask.dtype == torch.bool
    assert probability == keep_probability(x, p)
    assert abs(probability - (1 - p)) < 1e-5
    assert keep_probability(x.to("meta"), p) == 1 - p
    n = x.numel()
    if n > 10**6:  # five standard errors
        assert abs(share(mask) - probability) < 5 * (p * (1 - p) / n) ** 0.5
        rows = mask.double().mean(1)  # every part of a draw decides alike
        assert rows.std().item() < 1.3 * (p * (1 - p) / shape[1]) ** 0.5
        for lane in range(4):
            assert abs(share(mask.flatten()[lane::4]) - probability) < 5 * (4 * p * (1 - p) / n) ** 0.5


def test_masks_follow_the_seed_of_torch(kind):
    x = torch.ones(50, 50)

    def draw():
        mask, _ = sample_dropout_mask(x, 0.5)
        assert mask.dtype == kind
        return drop(x, mask)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


def test_nearly_everything_may_be_dropped():
    x = torch.ones(1000)
    assert keep_probability(x, 1 - 1e-7) > 0
    assert drop(x, _sample_booleans(x, 1 - 1e-7)).sum() < 10


def test_booleans_drop_in_any_shape():
    x = torch.randn(6, 5)
    mask = x > 0
    assert torch.equal(drop(x.view(2, 3, 5), mask), torch.where(mask, x, 0.0).view(2, 3, 5))
    assert drop(x, None) is x


def test_a_tensor_without_numbers_gets_booleans():
    with FakeTensorMode():
        assert sample_dropout_mask(torch.empty(4, 5), 0.3)[0].dtype == torch.bool
    assert sample_dropout_mask(torch.empty(4, 5, device="meta"), 0.3)[0].dtype == torch.bool


@needs_numba
@pytest.mark.parametrize("fused", [True, False], ids=["with_base", "base_apart"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param("cpu_train", each, marks=needs_vectors(each)) for each in (torch.float32, torch.bfloat16)),
        *itertools.product(["grouped", "dense"], [torch.float32, torch.bfloat16]),
    ],
    ids=str,
)
def test_the_gradients_of_a_seed_are_those_of_its_mask(name, fused, dtype):
    torch.manual_seed(3)
    (backend,) = (each for each in BACKENDS if each.name == name)
    inputs = make_inputs((2, 20, 32), 4, dtype, r=8, out=64, fused=fused)
    seed, _ = sample_dropout_mask(inputs.x, 0.3)
    results = []
    for mask in (seed, drop(torch.ones(inputs.x.shape), seed).bool()):
        output = compute(backend, inputs._replace(dropout_mask=mask)).output
        gradient = torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype)
        results.append([output, *torch.autograd.grad(output, leaves(inputs), gradient)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_what_is_kept_is_scaled_by_its_probability(kind, monkeypatch):
    """Where a mask is drawn within a computation; 0.3 is no multiple of the steps that decide."""
    (dense,) = (each for each in BACKENDS if each.name == "dense")
    inputs, drawn = make_inputs((20, 32), 4, torch.float32), []
    monkeypatch.setattr(
        "mola.tuner.kernels.autograd.sample_dropout_mask",
        lambda *arguments: drawn.append(sample_dropout_mask(*arguments)) or drawn[-1],
    )
    output = compute(dense, inputs._replace(settings=inputs.settings._replace(dropout=0.3))).output
    ((mask, probability),) = drawn
    assert mask.dtype == kind
    scaled = inputs.settings._replace(scaling=inputs.settings.scaling / probability)
    assert torch.equal(output, compute(dense, inputs._replace(dropout_mask=mask, settings=scaled)).output)


def test_dropout_leaves_the_mean_as_it_is():
    """Averaged over masks the update is the one without dropout."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), random_config(lora_dropout=0.3))
    layer = next(module for module in model.modules() if hasattr(module, "mola_A"))
    x = torch.randn(1, 1, layer.in_features)
    expected = layer.eval()(x)
    layer.train()
    mean = layer(x.expand(1, 4000, -1)).mean(1, keepdim=True)  # a mask for every token
    torch.testing.assert_close(mean, expected, atol=0.05 * expected.abs().max().item(), rtol=0)

"""Dropout from a seed: shares, independence, and the same gradients as with a mask."""

import pytest
import torch
from mola.tuner.dropout import draw_kept, drop
from mola.tuner.mixture import FrozenLinear, MixtureSettings, add_mixture
from torch._subclasses.fake_tensor import FakeTensorMode

from mola.tuner import dropout

pytest.importorskip("numba", reason="needs numba (the extra `cpu`)")

SIZE = 1000, 1001


def draw_mask(p, shape=SIZE, dtype=torch.float32):
    x = torch.ones(shape, dtype=dtype)
    kept, probability = draw_kept(x, p)
    assert kept.dtype == torch.int32
    assert kept.numel() == 3
    dropped = drop(x, kept)
    assert ((dropped == 0) | (dropped == 1)).all()
    return dropped.bool(), probability


def share(mask):
    return mask.double().mean().item()


@pytest.mark.parametrize("p", [1e-4, 0.05, 1 / 3, 0.5, 0.9])
def test_shares(p):
    torch.manual_seed(0)
    mask, probability = draw_mask(p)
    assert abs(probability - (1 - p)) < 1e-9
    error = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(share(mask) - probability) < 5 * error
    for step in (2, 4, 16, 1001) if p > 0.01 else ():  # every lane of a vector, every column
        lanes = mask.flatten()[: mask.numel() // step * step].view(-1, step).double().mean(0)
        assert abs(lanes - probability).max() < 6 * error * step**0.5


@pytest.mark.parametrize("p", [0.0, 1 - 1e-12])
def test_ends(p):
    mask, probability = draw_mask(p)
    assert probability == pytest.approx(1 - p, abs=1e-9)
    assert mask.all() if p == 0 else share(mask) < 1e-5


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 16, 64, 576, 1001])
def test_what_is_kept_does_not_depend_on_neighbours_or_on_the_last_mask(shift):
    torch.manual_seed(1)
    (first, _), (second, _) = draw_mask(0.3), draw_mask(0.3)
    pairs = [(first, second)] if shift == 0 else [(first, first), (first, second), (second, first)]
    for one, other in pairs:
        a, b = one.flatten()[shift:].double(), other.flatten()[: one.numel() - shift].double()
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_seeds_that_differ_in_one_bit_draw_other_masks():
    x = torch.ones(SIZE)
    for word in (0, 1):
        for bit in (0, 7, 31):
            seed = torch.tensor([12345, 678, 1 << 30], dtype=torch.int32)
            first = drop(x, seed).flatten()
            seed[word] ^= -(1 << 31) if bit == 31 else 1 << bit
            second = drop(x, seed).flatten()
            assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 5 / x.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_one_seed_keeps_the_same_in_every_format_and_shape(dtype):
    torch.manual_seed(2)
    x = torch.randn(30, 41)
    kept, _ = draw_kept(x, 0.3)
    mask = drop(torch.ones_like(x), kept).bool()
    assert torch.equal(drop(x.to(dtype), kept), torch.where(mask, x.to(dtype), 0.0))
    assert torch.equal(drop(x.view(5, 6, 41), kept), torch.where(mask, x, 0.0).view(5, 6, 41))
    assert torch.equal(drop(x.t().contiguous().t(), kept), torch.where(mask, x, 0.0))
    assert torch.equal(drop(torch.full_like(x, -0.0), kept), torch.zeros_like(x))


def test_masks_follow_the_seed_of_torch():
    torch.manual_seed(1)
    first, second = draw_mask(0.5)[0], draw_mask(0.5)[0]
    torch.manual_seed(1)
    assert torch.equal(first, draw_mask(0.5)[0])
    assert not torch.equal(first, second)


def test_without_numba_there_is_a_mask(monkeypatch):
    monkeypatch.setattr(dropout, "_kernel", lambda itemsize: None)
    x = torch.randn(40, 50)
    kept, _ = draw_kept(x, 0.3)
    assert kept.dtype == torch.bool
    assert torch.equal(drop(x, kept), torch.where(kept, x, 0.0))


def test_for_a_tensor_without_numbers_there_is_a_mask():
    with FakeTensorMode():
        assert draw_kept(torch.empty(4, 5), 0.3)[0].dtype == torch.bool
    assert draw_kept(torch.empty(4, 5, device="meta"), 0.3)[0].dtype == torch.bool


@pytest.mark.parametrize("num_experts", [4, 16])  # all experts, and chosen ones only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_the_gradients_of_a_seed_are_those_of_its_mask(num_experts, dtype, fused):
    torch.manual_seed(3)
    x = torch.randn(2, 20, 16, dtype=dtype, requires_grad=True)
    experts = [torch.randn(num_experts, 4, size, requires_grad=True) for size in (16, 24)]
    router = torch.randn(num_experts, 16, requires_grad=True)
    weight = torch.randn(24, 16, dtype=dtype)
    seed, _ = draw_kept(x, 0.3)
    mask = drop(torch.ones(x.shape), seed).bool()
    results = []
    for kept in (seed, mask):
        base = FrozenLinear(weight, None) if fused else torch.nn.functional.linear(x, weight).detach()
        done = add_mixture(base, x, *experts, router, kept, MixtureSettings(2, 1.5, dtype))
        gradient = torch.linspace(-1, 1, done.output.numel()).view(done.output.shape).to(dtype)
        results.append([done.output, *torch.autograd.grad(done.output, [x, *experts, router], gradient)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)

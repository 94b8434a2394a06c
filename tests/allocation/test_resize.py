"""Other numbers of experts for a module: what stays, what is exact, what is nearest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mola.allocation.resize import Experts, low_rank_mean, resize
from mola.tuner.layer import ExpertSettings, MolaLinear

IN, OUT, R = 7, 6, 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_experts(count, seed=0, r=R):
    generator = seeded(seed)
    A, B, router = (torch.randn(count, *rest, generator=generator) for rest in ((r, IN), (r, OUT), (IN,)))
    return Experts(A, B, router if count > 1 else None)


def update(A, B):
    return B.double().t() @ A.double()


def computed(experts, top_k, inputs):
    """What a layer with these tensors computes."""
    count = len(experts.A)
    layer = MolaLinear(nn.Linear(IN, OUT), "default", ExpertSettings(experts.A.shape[1], count, min(top_k, count), 4.0))
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        layer.mola_A["default"].copy_(experts.A)
        layer.mola_B["default"].copy_(experts.B)
        if experts.router is not None:
            layer.mola_router["default"].copy_(experts.router)
        return layer(inputs)


@given(st.integers(1, 6), st.integers(1, 9), st.booleans(), st.integers(1, 9))
def test_any_numbers(before, after, has_use, r):
    experts = random_experts(before, r=r)
    use = torch.rand(before, generator=seeded()) if has_use else None
    found = resize(experts, after, seeded(), use)
    assert found.A.shape == (after, r, IN)
    assert found.B.shape == (after, r, OUT)
    assert (found.router is None) == (after == 1)
    assert found.router is None or found.router.shape == (after, IN)
    assert all(tensor is None or torch.isfinite(tensor).all() for tensor in found)
    again = resize(experts, after, seeded(), use)
    assert all(
        first is second is None or torch.equal(first, second) for first, second in zip(found, again, strict=True)
    )
    if before == after:
        assert found is experts


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_one_expert_becomes_several_that_compute_the_same(top_k):
    experts, inputs = random_experts(1), torch.randn(50, IN, generator=seeded(1))
    expected = computed(experts, 1, inputs)
    torch.testing.assert_close(computed(resize(experts, 4, seeded()), top_k, inputs), expected)


def test_experts_that_are_alike_become_one_that_computes_the_same():
    one, inputs = random_experts(1), torch.randn(50, IN, generator=seeded(1))
    several = resize(one, 5, seeded())
    use = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4])
    torch.testing.assert_close(computed(resize(several, 1, seeded(), use), 1, inputs), computed(several, 2, inputs))


def test_without_use_the_smallest_update_is_dropped():
    experts = random_experts(4)
    experts.B[2] *= 0.01
    assert torch.equal(resize(experts, 3, seeded()).B, experts.B[[0, 1, 3]])


def test_the_most_used_expert_is_copied():
    experts, use = random_experts(3), torch.tensor([0.1, 0.7, 0.2])
    more = resize(experts, 5, seeded(), use)
    for old, new in zip(experts, more, strict=True):
        assert torch.equal(new[:3], old)
    assert torch.equal(more.A[3], experts.A[1])
    assert torch.equal(more.B[4], experts.B[1])
    assert 0 < (more.router[3] - experts.router[1]).norm() < 0.2 * experts.router[1].norm()


def test_copies_share_the_tokens_of_one_expert_per_token():
    experts, inputs = random_experts(3), torch.randn(500, IN, generator=seeded(1))
    before = computed(experts, 1, inputs)
    after = computed(resize(experts, 6, seeded()), 1, inputs)
    same = (before == after).all(dim=1).float().mean()
    assert same > 0.9


def test_merging_takes_the_most_similar_pair():
    experts = random_experts(4)
    experts.A[3], experts.B[3] = experts.A[1], 1.1 * experts.B[1]
    fewer = resize(experts, 3, seeded(), torch.ones(4) / 4)
    for old, new in zip(experts, fewer, strict=True):
        assert torch.equal(new[[0, 2]], old[[0, 2]])
    torch.testing.assert_close(update(fewer.A[1], fewer.B[1]), 1.05 * update(experts.A[1], experts.B[1]))
    torch.testing.assert_close(fewer.router[1], (experts.router[1] + experts.router[3]) / 2)


@given(st.integers(0, 1000), st.integers(3, 5))
def test_merging_takes_the_pair_that_loses_least(seed, count):
    """By `w_i w_j / (w_i + w_j) ||D_i - D_j||^2`, which is what a weighted mean of two is away from them."""
    generator = seeded(seed)
    sizes, use = torch.rand(count, generator=generator) + 0.1, torch.rand(count, generator=generator) + 0.1
    experts = random_experts(count, seed)
    experts.B.mul_(sizes[:, None, None])
    use = use / use.sum()
    updates = [update(A, B) for A, B in zip(experts.A, experts.B, strict=True)]
    losses = {
        (i, j): float(use[i] * use[j] / (use[i] + use[j]) * (updates[i] - updates[j]).square().sum())
        for i in range(count)
        for j in range(i + 1, count)
    }
    first, second = min(losses, key=losses.get)
    fewer = resize(experts, count - 1, seeded(), use)
    stays = [index for index in range(count) if index not in (first, second)]
    kept = [index for index in range(count) if index != second]
    assert all(torch.equal(fewer.A[kept.index(index)], experts.A[index]) for index in stays)


def test_merging_an_unused_expert_changes_little():
    """Router rows and updates are weighted by use, so that of an unused one hardly counts."""
    experts, inputs = random_experts(3), torch.randn(200, IN, generator=seeded(1)).abs()
    experts.router[1] = -100
    fewer = resize(experts, 2, seeded(), torch.tensor([0.5, 0.0, 0.5]))
    torch.testing.assert_close(computed(fewer, 2, inputs), computed(experts, 2, inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zero", ["A", "B"])
def test_experts_with_a_zero_factor(zero):
    experts = random_experts(2)
    getattr(experts, zero).zero_()
    A, B = low_rank_mean(experts.A, experts.B, torch.ones(2))
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert not update(A, B).any()


@pytest.mark.parametrize("r", [1, 2, 4, 9])
def test_low_rank_mean_is_the_nearest(r):
    experts, weights = random_experts(3, r=r), torch.tensor([0.2, 0.5, 0.3])
    mean = sum(w * update(A, B) for w, A, B in zip(weights.double(), experts.A, experts.B, strict=True))
    left, values, right = torch.linalg.svd(mean, full_matrices=False)
    nearest = left[:, :r] * values[:r] @ right[:r]
    A, B = low_rank_mean(experts.A, experts.B, 7 * weights)
    assert (A.shape, B.shape) == ((r, IN), (r, OUT))
    torch.testing.assert_close(update(A, B), nearest, rtol=1e-4, atol=1e-5)
    norms = [stack.flatten(1).norm(dim=1).mean().item() for stack in (experts.A, experts.B)]
    assert (A.norm() / B.norm()).item() == pytest.approx(norms[0] / norms[1], rel=1e-4)


def test_untrained_experts_can_still_learn():
    experts = random_experts(3)
    experts.B.zero_()
    one = resize(experts, 1, seeded())
    assert torch.count_nonzero(one.B) == 0
    assert torch.count_nonzero(one.A) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype):
    experts = random_experts(3)
    experts = Experts(experts.A.to(dtype), experts.B.to(dtype), experts.router)
    for count in (1, 2, 5):
        found = resize(experts, count, seeded())
        assert (found.A.dtype, found.B.dtype) == (dtype, dtype)
        assert found.router is None or found.router.dtype == torch.float32

"""Rank reduction and regression, against dense matrices and plain least squares; memory of the moments."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mola import MolaError
from mola.data.tokenized import IGNORED
from mola.exporting.calibration import Row, answer_weights
from mola.exporting.moments import gather_moments, group_by_input, moment_bytes, split_by_memory
from mola.exporting.regression import cut_rank, ridge_cholesky, solve_full, solve_low_rank


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("out", "m", "inside"), [(9, 6, 7), (4, 10, 12), (12, 10, 4)])
@pytest.mark.parametrize("rank", [3, 20])
def test_cut_rank_is_the_truncated_svd(out, m, inside, rank):
    left, right = random(out, m), random(m, inside)
    B, A = cut_rank(left, right, rank)
    u, s, v = torch.linalg.svd(left @ right, full_matrices=False)
    torch.testing.assert_close(B @ A, (u[:, :rank] * s[:rank]) @ v[:rank])
    assert A.shape[0] == min(rank, out, m, inside)


def moments_of(x, h):
    return x.t() @ x, h.t() @ x


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_regression_is_reduced_rank_least_squares(rank):
    """The textbook's way, with dense matrices: the ridge as further rows, then the fitted values cut to a rank."""
    tokens, inside, out, m, ridge = 50, 8, 7, 5, 0.05
    x, h, left = random(tokens, inside) @ random(inside, inside), random(tokens, m), random(out, m)
    second, cross = moments_of(x, h)
    lam = ridge * (second.diagonal().mean() + second.diagonal() / 10)
    root, found = ridge_cholesky(second, ridge)
    torch.testing.assert_close(found, lam)
    towards = random(m, inside)
    B, A = solve_low_rank(root, cross + found * towards, left, rank)
    rows = torch.cat([x, lam.sqrt().diag()])
    wanted = torch.cat([h @ left.t(), lam.sqrt()[:, None] * (left @ towards).t()])
    full = torch.linalg.lstsq(rows, wanted).solution
    v = torch.linalg.svd(rows @ full, full_matrices=False).Vh[:rank]
    torch.testing.assert_close(B @ A, (full @ v.t() @ v).t())
    torch.testing.assert_close(left @ solve_full(root, cross + found * towards), full.t())

    def loss(update):
        return (wanted - rows @ update.t()).square().sum()

    # No other update of this rank is better.
    best = loss(B @ A)
    for seed in range(5):
        torch.manual_seed(seed)
        assert loss((B + 1e-3 * torch.randn_like(B)) @ (A + 1e-3 * torch.randn_like(A))) >= best


def test_an_input_far_larger_than_the_others_leaves_a_positive_matrix():
    """As in the down projections of language models: rounded to float32, the products are not positive definite."""
    torch.manual_seed(0)
    x = torch.randn(300, 64)
    x[:, 5] *= 1e6
    x[:, 7] = x[:, 5] * (1 + 1e-6 * torch.randn(300))
    second = x.double().t() @ x.double()
    second[7, 7] *= 1 - 2**-23  # a rounding error, which other processors make elsewhere
    assert torch.linalg.eigvalsh(second)[0] < 0
    root, _ = ridge_cholesky(second)
    assert torch.isfinite(root).all()


def test_inputs_that_are_always_zero_get_no_update():
    B, A = solve_low_rank(ridge_cholesky(torch.zeros(4, 4, dtype=torch.float64))[0], random(3, 4) * 0, random(5, 3), 2)
    assert not (B @ A).any()


class Two(nn.Module):
    """Two linears with one input, one with another, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.idle = (nn.Linear(n, 3, bias=False) for n in (4, 4, 3, 4))

    def forward(self, input_ids, **_):
        x = torch.nn.functional.one_hot(input_ids, 4).float()
        self.a(x)
        self.logits = self.c(self.b(x))
        return self


def test_moments_are_sums_over_all_tokens():
    model = Two()
    modules = dict(model.named_children())
    batches = [torch.tensor([[0, 1, 2]]), torch.tensor([[3, 3], [1, 0]])]
    groups = group_by_input(model, modules, batches[0])
    assert groups == [["a", "b"], ["c"], ["idle"]]
    found = gather_moments(model, modules, groups, lambda name, x: 2 * x[:, :2], batches)
    assert found[2] is None
    x = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 3, 1, 0]), 4).double()
    torch.testing.assert_close(found[0].second, x.t() @ x)
    torch.testing.assert_close(found[0].cross["b"], 2 * x[:, :2].t() @ x)
    assert [each.cross.keys() for each in found[:2]] == [{"a", "b"}, {"c"}]
    y = x @ model.b.weight.double().t()
    torch.testing.assert_close(found[1].second, y.t() @ y)


def test_a_token_of_weight_three_counts_three_times():
    model = Two()
    modules, features = dict(model.named_children()), lambda name, x: 2 * x[:, :2]
    weights = [torch.tensor([[1.0, 3.0, 1.0]]), torch.tensor([[1.0, 1.0]])]
    once = gather_moments(
        model, modules, [["a", "b"]], features, [torch.tensor([[0, 1, 2]]), torch.tensor([[3, 3]])], weights
    )
    three = gather_moments(model, modules, [["a", "b"]], features, [torch.tensor([[0, 1, 1, 1, 2, 3, 3]])])
    torch.testing.assert_close(once[0].second, three[0].second)
    torch.testing.assert_close(once[0].cross["b"], three[0].cross["b"])


def test_tokens_before_an_answer_have_its_weight():
    rows = [Row([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), Row([5, 6], [5, 6])]
    short, long = answer_weights(rows, 10.0)
    assert (short.tolist(), long.tolist()) == ([[10.0, 1.0]], [[1.0, 10.0, 10.0, 1.0]])


def test_numbers_that_are_not_finite_are_refused():
    model = Two()
    model.b.weight.data.fill_(float("inf"))
    with pytest.raises(MolaError, match="'c' must be finite"):
        gather_moments(model, dict(model.named_children()), [["c"]], lambda name, x: x, [torch.tensor([[0, 1]])])


def test_llama_2_7b_stays_below_24_gb():
    """8 experts of rank 8 in seven linears of 32 layers."""
    layer = [moment_bytes(4096, [64] * 3), moment_bytes(4096, [64]), moment_bytes(4096, [64] * 2)]
    layer.append(moment_bytes(11008, [64]))
    sizes = layer * 32
    assert sum(sizes) > 24e9  # too much for all layers at once
    parts = split_by_memory(sizes, 24e9)
    assert [index for part in parts for index in part] == list(range(len(sizes)))
    for part in parts:
        assert sum(sizes[i] for i in part) + 2 * max(sizes[i] for i in part) <= 24e9
    assert len(parts) == 3
    with pytest.raises(MolaError, match=r"`memory_gb` must be at least 2\.9"):
        split_by_memory(sizes, 1e9)


@pytest.mark.parametrize(("least", "expected"), [(1, 1), (2, 3), (3, 4), (7, 7), (50, 7)])
def test_there_are_at_least_as_many_parts_as_requested(least, expected):
    parts = split_by_memory([10] * 7, 1000, least)
    assert len(parts) == expected
    assert [index for part in parts for index in part] == list(range(7))


WIDEST = """
import re, torch
from torch import nn
from mola.exporting.regression import ridge_cholesky, solve_low_rank
from mola.exporting.moments import gather_moments

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Linear(11008, 16, bias=False)

    def forward(self, input_ids, **_):
        self.logits = self.down_proj(torch.randn(*input_ids.shape, 11008))
        return self

model, A = Model(), torch.randn(64, 11008)
# Not `ru_maxrss`, which begins with that of the process that has started this one.
used = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = used()
rows = [torch.zeros(1, 64, dtype=torch.long)] * 2
(moments,) = gather_moments(model, {"down_proj": model.down_proj}, [["down_proj"]], lambda name, x: x @ A.t(), rows)
root, _ = ridge_cholesky(moments.second)
solve_low_rank(root, moments.cross["down_proj"], torch.randn(4096, 64, dtype=torch.float64), 8)
print(used() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_the_widest_linear_of_llama_2_7b_needs_the_computed_memory():
    done = subprocess.run([sys.executable, "-c", WIDEST], capture_output=True, text=True, check=True)
    assert moment_bytes(11008, [64]) < int(done.stdout) * 1024 < 3 * moment_bytes(11008, [64])

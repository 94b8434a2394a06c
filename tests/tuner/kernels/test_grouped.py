"""The grouped backend: how it sorts, what it costs, and where it is used."""

import pytest
import torch

from mola.tuner.kernels.api import OTHER_ROUTER
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.grouped import ExpertSort, Grouped

from ..counting import CountOperators
from .inputs import make_inputs

WIDE = "not torch.float64"
ROWS, SLOW, FEW = "rows of whole 16 bytes", "except in float32 on a CPU", "for so few experts or tokens"


def test_assignments_are_sorted_by_expert_and_by_token():
    expert_indices = torch.tensor([[2, 0, 2, 1], [0, 2, 4, 0]])
    tokens, permutation, ends, kept = ExpertSort.of(expert_indices, 5)
    assert tokens.tolist() == [1, 0, 3, 3, 0, 2, 1, 2]
    assert expert_indices.flatten()[permutation].tolist() == [0, 0, 0, 1, 2, 2, 2, 4]
    assert ends.tolist() == [3, 4, 7, 7, 8]
    assert ends.dtype == torch.int32
    assert kept is expert_indices


def test_operators_do_not_grow_with_the_number_of_experts():
    counts = []
    for num_experts in (4, 64):
        inputs = make_inputs((4, 16, 16), num_experts, torch.float32, r=8, out=24)
        with CountOperators() as counter:
            compute(Grouped(), inputs).output.sum().backward()
        counts.append(counter.operators)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "r", "dtype", "tokens", "expected"),
    [
        (24, 2, 8, torch.float32, 512, (None, None)),
        (23, 2, 8, torch.float32, 512, (FEW, None)),  # oneDNN makes the products of all in half the time
        (16, 2, 8, torch.float32, 512, (FEW, None)),
        (15, 2, 8, torch.float32, 512, (FEW, FEW)),
        (12, 1, 8, torch.float32, 512, (None, None)),
        (47, 4, 8, torch.float32, 512, (FEW, None)),
        (64, 2, 8, torch.float32, 64, (None, None)),
        (64, 2, 8, torch.float32, 63, (FEW, FEW)),  # most experts would be idle
        (64, 2, 6, torch.float32, 512, (ROWS, ROWS)),
        (64, 2, 4, torch.bfloat16, 512, (ROWS, ROWS)),
        (64, 2, 8, torch.bfloat16, 512, (SLOW, SLOW)),
        (64, 2, 8, torch.float64, 512, (WIDE, WIDE)),
    ],
)
@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", ""])
def test_where_it_is_used(num_experts, top_k, r, dtype, tokens, expected, onednn, monkeypatch):
    monkeypatch.setattr("mola.tuner.kernels.grouped.onednn_is_faster", lambda: onednn)
    inputs = make_inputs((tokens, 16), num_experts, dtype, r=r, out=32, top_k=top_k)
    reason = Grouped().why_unsupported(inputs) or Grouped().why_slower(inputs)
    wanted = expected[0 if onednn else 1]
    assert reason is None if wanted is None else wanted in reason


def test_where_it_cannot_be_used():
    inputs = make_inputs((64, 16), 32, torch.float32, r=8, out=24)
    assert Grouped().why_unsupported(inputs) is None
    assert (
        Grouped().why_unsupported(inputs._replace(settings=inputs.settings._replace(router="sigmoid"))) == OTHER_ROUTER
    )
    swapped = inputs.experts_B.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert Grouped().why_unsupported(inputs._replace(experts_B=swapped)) == "grouped products need contiguous experts"
    assert Grouped().why_slower(inputs._replace(x=inputs.x.to("meta"))).endswith(SLOW)

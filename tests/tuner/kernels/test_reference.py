"""The update from chosen experts alone, which compiled programs use, without a compiler."""

import pytest
import torch
from mola.tuner.pieces import update_of_chosen

from mola.tuner.routing import Routing, dense_gates


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (3, 3), (5, 1), (1, 1)])
def test_update_of_chosen_experts_is_the_sum_over_all(num_experts, top_k, dtype, expected):
    generator = torch.Generator().manual_seed(0)
    rows, experts_A, experts_B = (
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        for size in ((6, 9), (num_experts, 2, 9), (num_experts, 2, 7))
    )
    indices = torch.rand(6, num_experts, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(6, top_k, generator=generator).softmax(1)
    routing = Routing(indices, weights)
    update = update_of_chosen(rows, experts_A, experts_B, routing, 1.5)
    gates = dense_gates(routing, num_experts).double()
    each = torch.einsum("ni,eri,ero->neo", rows.double(), experts_A.double(), experts_B.double())
    torch.testing.assert_close(update.double(), 1.5 * (gates.unsqueeze(2) * each).sum(1), rtol=1e-5, atol=1e-5)
    assert update.dtype == expected

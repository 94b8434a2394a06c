"""What a token sees: against updates that are formed as whole matrices."""

import pytest
import torch
from benchmarks.token_updates import effective_ranks, forms, measured_updates, summary
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from mola import MolaConfig, MolaError
from mola.insight.recorder import effective_experts
from mola.tuner.routing import dense_gates, top_k_softmax


def experts(num_experts, r, seed=0, width_in=12, width_out=9):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_experts, r, width, generator=generator) for width in (width_in, width_out))


def random_gates(num_tokens, num_experts, top_k, seed=0):
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).double()
    return dense_gates(top_k_softmax(logits, top_k), num_experts)


def dense_rank(update):
    squares = torch.linalg.svdvals(update.double()).square()
    return (squares.sum() ** 2 / squares.square().sum()).item()


@given(st.integers(1, 5), st.integers(1, 4), st.data(), st.integers(0, 2**31))
def test_rank_equals_that_of_the_whole_update(num_experts, r, data, seed):
    top_k = data.draw(st.integers(1, num_experts))
    A, B = experts(num_experts, r, seed)
    gates = random_gates(6, num_experts, top_k, seed)
    found = effective_ranks(gates, forms(A, B))
    updates = torch.einsum("ne,ero,eri->noi", gates, B.double(), A.double())
    torch.testing.assert_close(found, torch.tensor([dense_rank(each) for each in updates]).double())
    assert (found <= r * top_k + 1e-9).all()
    assert (found >= 1 - 1e-9).all()


def test_equal_orthogonal_directions_count_as_many_and_a_zero_update_as_none():
    rows = torch.eye(6).unsqueeze(0)
    assert effective_ranks(torch.ones(1, 1).double(), forms(rows, rows)).item() == pytest.approx(6)
    assert effective_ranks(torch.ones(1, 1).double(), forms(rows, torch.zeros_like(rows))).item() == 0


def test_effective_experts_of_known_gates():
    gates = torch.tensor([[1.0, 0, 0], [0.5, 0, 0.5], [0.9, 0.1, 0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(effective_experts(gates, 1), torch.tensor([1, 2, 1 / 0.82, 3]))
    assert effective_experts(random_gates(9, 4, 1), 1).tolist() == [1] * 9


def test_a_summary_has_the_mean_and_quantiles():
    assert summary(torch.arange(11.0)) == pytest.approx({"mean": 5, "p10": 1, "p50": 5, "p90": 9})


@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        ({"num_experts": [1, 2, 3, 4], "top_k": [1, 2, 2, 2], "r": 3}, 7),
        ({"num_experts": 3, "top_k": 1, "r": 2}, 28),
        ({"num_experts": 1, "r": 5}, 28),
    ],
    ids=["mixture", "top_k 1", "LoRA"],
)
def test_measures_of_a_model_equal_dense_ones(tiny_model, settings, alone):
    """`alone` is the number of linears whose tokens see exactly one expert."""
    model = get_peft_model(tiny_model, MolaConfig(**settings, init_lora_weights=False)).eval()
    ids = torch.randint(2, 250, (2, 9))
    calls = {}
    with measured_updates(model) as linears:
        for each in linears:
            each.layer.register_forward_hook(lambda layer, inputs, _, name=each.name: calls.update({name: inputs[0]}))
        model(input_ids=ids)
    assert len(linears) == len(calls) == 4 * 7
    for each in linears:
        layer, x = each.layer, calls[each.name].flatten(0, 1)
        count = layer.num_experts["default"]
        gates = dense_gates(layer.route("default", x), count) if count > 1 else torch.ones(len(x), 1)
        factors = layer.mola_B["default"].detach(), layer.mola_A["default"].detach()
        updates = layer.scaling["default"] * torch.einsum("ne,ero,eri->noi", gates, *factors)
        norms = (updates @ x.unsqueeze(-1)).squeeze(-1).norm(dim=1)
        expected = {
            "effective_experts": 1 / gates.square().sum(1),
            "effective_rank": torch.tensor([dense_rank(update) for update in updates]),
            "update_norm": norms,
            "relative_norm": norms / layer.base_layer(x).norm(dim=1),
        }
        row = each.row()
        for key, values in expected.items():
            assert row[key] == pytest.approx(summary(values), rel=1e-3), (each.name, key)
        assert row["first_gate_above"] == pytest.approx((gates.amax(1) > 0.9).float().mean().item())
        assert row["mean_update_rank"] == pytest.approx(dense_rank(updates.mean(0)), rel=1e-3)
        assert row["mean_gates"] == pytest.approx(gates.mean(0).tolist(), rel=1e-3, abs=1e-6)
        assert row["tokens"] == 18
        assert row["effective_rank"]["p90"] <= layer.r["default"] * layer.top_k["default"]
    assert sum(set(each.row()["effective_experts"].values()) == {1} for each in linears) == alone


def test_hooks_end_with_the_block(tiny_model):
    model = get_peft_model(tiny_model, MolaConfig(num_experts=2, r=2)).eval()
    ids = torch.randint(2, 250, (1, 5))
    with measured_updates(model) as linears:
        model(input_ids=ids)
    model(input_ids=ids)
    assert {each.row()["tokens"] for each in linears} == {5}


def test_measuring_without_gradients_sees_every_token(tiny_model):
    """Few tokens are computed by a function of their own, which must not pass the frozen linears by."""
    model = get_peft_model(tiny_model, MolaConfig(num_experts=2, r=2)).eval()
    with measured_updates(model) as linears, torch.no_grad():
        model(input_ids=torch.randint(2, 250, (1, 1)))
    assert {each.row()["tokens"] for each in linears} == {1}


def test_an_adapter_of_another_method_is_refused(tiny_model):
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with pytest.raises(MolaError, match="no linear of the model has experts"), measured_updates(model):
        pass

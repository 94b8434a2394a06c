"""Taking an expert out: the same as a logit of minus infinity, and the model is as before afterwards."""

import math

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from mola import MolaConfig, MolaLinear
from mola.insight.ablation import answer_loss, expert_left_out, list_experiments, measure_losses_without
from mola.tuner.layer import ExpertSettings

SAMPLES = [
    {"input_ids": [0, 5, 9, 17, 3, 250, 80], "labels": [-100, -100, -100, -100, 3, 250, 80]},
    {"input_ids": [0, 7, 7, 12], "labels": [-100, -100, 7, 12]},
]


@pytest.fixture
def model(tiny_model_dir):
    torch.manual_seed(1)
    config = MolaConfig(num_experts=[1, 2, 3, 4], top_k=[1, 2, 1, 3], r=4, init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), config).eval()


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("tokens", [3, 40])
def test_leaving_out_an_expert_equals_a_logit_of_minus_infinity(num_experts, top_k, tokens):
    torch.manual_seed(0)
    settings = ExpertSettings(4, num_experts, top_k, 8.0, init_lora_weights=False)
    layer = MolaLinear(torch.nn.Linear(16, 12), "default", settings).eval()
    x = torch.randn(tokens, 16)
    whole = layer(x)
    logits = layer.router_logits("default", x)
    updates = torch.einsum("ni,eri,ero->neo", x, layer.mola_A["default"], layer.mola_B["default"])
    for expert in range(num_experts):
        left = logits.index_fill(1, torch.tensor([expert]), -math.inf)
        values, chosen = left.topk(min(top_k, num_experts - 1), dim=1)
        gates = torch.zeros_like(left).scatter(1, chosen, values.softmax(1))
        expected = layer.base_layer(x) + layer.scaling["default"] * (gates.unsqueeze(-1) * updates).sum(1)
        for grad in (torch.enable_grad, torch.no_grad):
            with expert_left_out([layer], expert), grad():
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x), whole)


def test_experiments_cover_every_expert_and_restore_the_model(model):
    before = dict(model.named_parameters())
    by_layer, by_module = list_experiments(model, "layers"), list_experiments(model, "modules")
    assert [(each.layer_index, each.expert) for each in by_layer] == [
        (layer, expert) for layer in (1, 2, 3) for expert in range(layer + 1)
    ]
    assert all(each.module is None and len(each.layers) == 7 for each in by_layer)
    assert len(by_module) == 7 * (2 + 3 + 4)
    assert len({(each.module, each.expert) for each in by_module}) == len(by_module)
    loss, found = measure_losses_without(model, SAMPLES, by_layer)
    assert loss == answer_loss(model, SAMPLES)
    assert len({row.loss_change for row in found}) == len(found)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_answer_loss_counts_only_answers(model):
    total, count = 0.0, 0
    for sample in SAMPLES:
        ids, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss.item()
        number = int((labels != -100).sum())
        total, count = total + mean * number, count + number
    assert answer_loss(model, SAMPLES) == pytest.approx(total / count, rel=1e-6)


def test_the_loss_does_not_change_without_an_expert_that_is_never_chosen(model):
    for module in model.modules():
        if isinstance(module, MolaLinear) and module.layer_index == 2:
            torch.nn.init.zeros_(module.mola_router["default"])  # of equal logits the first is chosen
    _, found = measure_losses_without(model, SAMPLES, list_experiments(model, "layers"))
    changes = {row.expert: row.loss_change for row in found if row.layer_index == 2}
    assert changes[1] == pytest.approx(0, abs=1e-6)
    assert changes[2] == pytest.approx(0, abs=1e-6)
    assert abs(changes[0]) > 1e-4


def test_an_error_restores_the_model(model):
    layers = [module for module in model.modules() if isinstance(module, MolaLinear) and module.layer_index == 3]
    with pytest.raises(IndexError), expert_left_out(layers, 1):
        model(torch.tensor([[10**6]]))  # no such token
    assert {len(layer.mola_A["default"]) for layer in layers} == {4}
    assert {layer.settings["default"].top_k for layer in layers} == {3}

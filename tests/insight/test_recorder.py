"""Recorded gates are those the layers compute with."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mola import MolaConfig
from mola.insight.recorder import gates_of_tokens, recorded_gates

IDS = [0, 5, 9, 17, 3, 250, 80]


@pytest.fixture
def model(tiny_model_dir):
    torch.manual_seed(1)
    config = MolaConfig(num_experts=[1, 2, 3, 4], top_k=[1, 2, 2, 2], r=4, init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).eval()


def test_gates_by_module(model):
    modules = gates_of_tokens(model, IDS)
    assert len(modules) == 3 * 7  # the first layer has no routers
    for each in modules:
        experts = each.layer_index + 1
        assert each.gates.shape == (len(IDS), experts)
        assert torch.equal((each.gates > 0).sum(1), torch.full((len(IDS),), 2))
        torch.testing.assert_close(each.gates.sum(1), torch.ones(len(IDS)))
    assert {each.module.rpartition(".")[2] for each in modules} == {
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_recorded_gates_give_the_output_of_the_layer(model):
    """The update of a layer, put together from the recorded gates."""
    layer = model.base_model.model.model.layers[3].self_attn.q_proj
    calls = []
    with layer.register_forward_hook(lambda _, args, output: calls.append((args[0][0], output[0]))):
        gates = next(each.gates for each in gates_of_tokens(model, IDS) if each.module.endswith("3.self_attn.q_proj"))
    [(x, output)] = calls
    updates = torch.einsum("ni,eri,ero->neo", x, layer.mola_A["default"], layer.mola_B["default"])
    expected = layer.base_layer(x) + layer.scaling["default"] * (gates.unsqueeze(-1) * updates).sum(1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_recording_does_not_change_a_generation(model):
    """Recording changes nothing, and what it says of a generated text later is what happened."""
    prompt = torch.tensor([IDS])
    plain = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, pad_token_id=1, eos_token_id=None)
    with recorded_gates(model) as recorded:
        again = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, pad_token_id=1, eos_token_id=None)
    assert torch.equal(plain, again)
    name = recorded[0].module
    while_generating = torch.cat([each.gates for each in recorded if each.module == name])
    afterwards = next(each.gates for each in gates_of_tokens(model, again[0].tolist()) if each.module == name)
    torch.testing.assert_close(while_generating, afterwards[:-1], rtol=1e-4, atol=1e-5)


def test_recording_ends_with_the_block(model):
    with recorded_gates(model) as recorded:
        pass
    model(torch.tensor([IDS]))
    assert recorded == []


def test_a_disabled_adapter_is_not_recorded(model):
    with model.disable_adapter():
        assert gates_of_tokens(model, IDS) == []


def test_other_methods_have_no_routers(tiny_model_dir):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(target_modules=["q_proj"]))
    assert gates_of_tokens(model.eval(), IDS) == []

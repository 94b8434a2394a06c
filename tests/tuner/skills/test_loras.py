"""What a LoRA must be to become a skill of a model."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from mola.errors import MolaError
from mola.tuner.skills.loras import LoraStore, lora_scale

Q_PROJ = "model.layers.2.self_attn.q_proj"


def write(folder, shapes, **settings):
    folder.mkdir()
    tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, **settings}))
    return folder


def pair(module, rank=2, sizes=(32, 32)):
    return {f"{module}.lora_A.weight": (rank, sizes[0]), f"{module}.lora_B.weight": (sizes[1], rank)}


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({"model.embed_tokens.lora_embedding_A": (2, 258)}, "a LoRA on linears alone"),
        ({**pair(Q_PROJ), f"{Q_PROJ}.lora_magnitude_vector": (32,)}, "a LoRA on linears alone"),
        ({**pair(Q_PROJ), "lm_head.weight": (4, 4)}, "a LoRA on linears alone"),
        (pair("model.layers.2.self_attn"), "which is no linear"),
        (pair("model.layers.9.self_attn.q_proj"), "which is no linear"),
        (pair(Q_PROJ, sizes=(64, 64)), "has 32 inputs and 32 outputs"),
        ({f"{Q_PROJ}.lora_A.weight": (2, 32)}, "has 32 inputs and 32 outputs"),
    ],
)
def test_what_a_skill_cannot_be(shapes, problem, loaded_tiny_model, tmp_path):
    store = LoraStore(loaded_tiny_model)
    with pytest.raises(MolaError, match=problem):
        store.add("first", write(tmp_path / "lora", shapes))
    assert store.names == []


def test_experts_of_the_base_model_are_no_targets(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 2}
    store = LoraStore(Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=24)))
    experts = [name for name in store.linears if ".experts." in name]
    name = experts[0] if experts else "model.layers.0.mlp.experts.0.up_proj"
    with pytest.raises(MolaError, match="an expert of the base model|which is no linear"):
        store.add("first", write(tmp_path / "expert", pair(name, sizes=(32, 16))))
    shared = "model.layers.0.mlp.shared_expert.up_proj"
    assert store.add("second", write(tmp_path / "shared", pair(shared, sizes=(32, 24)))) == [shared]


def test_a_frozen_weight_that_peft_saves_too_is_left_out(loaded_tiny_model, tmp_path):
    store = LoraStore(loaded_tiny_model)
    folder = write(tmp_path / "lora", {**pair(Q_PROJ), f"{Q_PROJ}.base_layer.weight": (32, 32)})
    store.add("first", folder)
    lora = store.get(["first"])["first"]
    assert {*lora} == {Q_PROJ}
    assert lora[Q_PROJ].scale == 2


def test_a_file_that_is_missing(loaded_tiny_model, tmp_path):
    with pytest.raises(MolaError, match="cannot be read: .* Copy the skill's folder again"):
        LoraStore(loaded_tiny_model).add("first", tmp_path)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3),
        ({"lora_alpha": 6, "alpha_pattern": {"q_proj": 8}}, 2),
        ({"lora_alpha": 6, "alpha_pattern": {"layers.3.self_attn.q_proj": 8}}, 1.5),
    ],
)
def test_the_scale_of_a_linear(settings, scale):
    assert lora_scale(settings, Q_PROJ, 4) == scale

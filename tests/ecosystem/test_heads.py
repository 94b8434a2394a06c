"""Heads of classifiers are trained in full and saved, whatever the task; `mola plan` sees what training adapts."""

import json

import pytest
import torch
from peft import AutoPeftModelForQuestionAnswering, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForQuestionAnswering,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from mola import MolaConfig, MolaError, PlanOptions, plan
from mola.architecture.linears import is_adaptable
from tests.ecosystem.families import adapt, batch, build, layers

POSITIONS = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}


def test_question_answering(tmp_path):
    config = build("token-classifier").config
    config.num_labels = 2  # begin and end
    base = BertForQuestionAnswering(config)
    base.save_pretrained(tmp_path / "base")
    base = BertForQuestionAnswering.from_pretrained(tmp_path / "base")
    model = adapt(base, "token-classifier", task_type=TaskType.QUESTION_ANS, target_modules="all-linear")
    assert not any("qa_outputs" in name for name in layers(model))
    inputs = {name: value for name, value in batch("token-classifier").items() if name != "labels"}
    head = model.base_model.model.qa_outputs.modules_to_save["default"].weight
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    before = head.detach().clone()
    model(**inputs, **POSITIONS).loss.backward()
    optimizer.step()
    assert not torch.equal(head, before)

    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForQuestionAnswering.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**inputs).start_logits, model(**inputs).start_logits)


@pytest.mark.parametrize("family", ["sequence-classifier", "token-classifier"])
def test_heads_are_saved_beside_modules_of_the_users_choice(family, tmp_path):
    norm = "model.norm" if family == "sequence-classifier" else "embeddings.LayerNorm"
    head = "score" if family == "sequence-classifier" else "classifier"
    model = adapt(build(family), family, modules_to_save=[norm])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    for each in (model, again):
        whole = {name: p for name, p in each.named_parameters() if ".modules_to_save." in name}
        modules = {name.split(".modules_to_save")[0].rpartition(".")[2] for name in whole}
        assert modules == {norm.rpartition(".")[2], head}
        assert all(parameter.requires_grad for parameter in whole.values())


SMALL = {"d_model": 32, "vocab_size": 64, "num_labels": 3, "pad_token_id": 0, "eos_token_id": 1}
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "bos_token_id": 2}
T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_heads_that_peft_does_not_know_are_trained_and_saved(kind, tmp_path):
    """They are called `classification_head` there, and began at random and stayed so."""
    make, config = {
        "bart": (BartForSequenceClassification, BartConfig(**SMALL, **BART)),
        "t5": (T5ForSequenceClassification, T5Config(**SMALL, **T5)),
    }[kind]
    torch.manual_seed(0)
    base = make(config).eval()
    base.save_pretrained(tmp_path / "base")
    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 10, 1]])
    settings = {"num_experts": 2, "top_k": 2, "r": 2, "task_type": TaskType.SEQ_CLS, "init_lora_weights": False}
    model = get_peft_model(base, MolaConfig(**settings, target_modules="all-linear")).eval()
    assert not any("classification_head" in name for name in layers(model))
    heads = {name: p for name, p in model.named_parameters() if "classification_head.modules_to_save" in name}
    assert heads
    for parameter in heads.values():
        assert parameter.requires_grad
        parameter.data += 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    # One of an earlier version has no head, and keeps the base's.
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"modules_to_save": ["classifier", "score"], "weights_sha256": None}
    path.write_text(json.dumps(config))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "classification_head" not in k}, weights)
    old = PeftModel.from_pretrained(make.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert not any("modules_to_save" in name for name, _ in old.named_parameters())


@pytest.mark.parametrize("rescale_every", [0, 2])
def test_an_rwkv_must_not_rescale_its_weights(rescale_every):
    """In evaluation it would divide its own weights, and not those of experts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "context_length": 64}
    base, ids = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=rescale_every)), torch.arange(12)[None]
    config = MolaConfig(num_experts=2, r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    if rescale_every:
        with pytest.raises(MolaError, match="set `rescale_every` to 0"):
            get_peft_model(base, config)
        return
    model = get_peft_model(base, config)
    with torch.no_grad():
        found = [model.train(mode)(input_ids=ids).logits for mode in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_plan_of_a_language_model_beside_a_tower(tmp_path):
    base = build("gemma3-composite")
    base.config.save_pretrained(tmp_path)
    planned = plan(PlanOptions(base_model=str(tmp_path), num_experts="2-4", r="4"))
    model = adapt(base, "gemma3-composite")
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (len(planned.layers), planned.trainable_parameters) == (4, trainable)
    with pytest.raises(MolaError, match=r"4 decoder layers.*vision_tower"):
        plan(PlanOptions(base_model=str(tmp_path), num_experts="2-4", target_modules="all-linear"))


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["linear1", "linear2"]}, {"target_modules": [], "target_parameters": ["linear1.weight"]}],
    ids=list,
)
def test_pytorchs_encoder_uses_its_experts_in_evaluation(targets):
    """Its fast path there reads the weights of its linears, and takes padded batches in a form of its own."""
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, False, True]])
    with torch.no_grad():
        plain = base(x, src_key_padding_mask=padding)[0]
        model = get_peft_model(base, MolaConfig(num_experts=2, r=2, init_lora_weights=False, **targets))
        found = [model.train(mode)(x, src_key_padding_mask=padding)[0] for mode in (True, False)]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[1], plain, atol=1e-3)


def test_linears_that_are_never_called_are_not_adapted():
    assert not is_adaptable(nn.MultiheadAttention(8, 2).out_proj)
    model = adapt(build("gemma3-composite"), "gemma3-composite", target_modules="all-linear", num_experts=2)
    assert not any("head.attention.out_proj" in name for name in layers(model))

"""Heads of classifiers are trained in full and saved, whatever the task; `mola plan` sees what training adapts."""

import pytest
import torch
from peft import AutoPeftModelForQuestionAnswering, PeftModel, TaskType
from torch import nn
from transformers import BertForQuestionAnswering

from mola import MolaError, PlanOptions, plan
from mola.architecture.linears import adaptable
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


def test_plan_of_a_language_model_beside_a_tower(tmp_path):
    base = build("gemma3-composite")
    base.config.save_pretrained(tmp_path)
    planned = plan(PlanOptions(base_model=str(tmp_path), num_experts="24", r="4"))
    model = adapt(base, "gemma3-composite")
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (len(planned.layers), planned.trainable_parameters) == (4, trainable)
    with pytest.raises(MolaError, match=r"4 decoder layers.*vision_tower"):
        plan(PlanOptions(base_model=str(tmp_path), num_experts="24", target_modules="all-linear"))


def test_weights_that_are_read_and_never_called_are_not_adaptable():
    assert not adaptable(nn.MultiheadAttention(8, 2).out_proj)
    model = adapt(build("gemma3-composite"), "gemma3-composite", target_modules="all-linear", num_experts=2)
    assert not any("head.attention.out_proj" in name for name in layers(model))

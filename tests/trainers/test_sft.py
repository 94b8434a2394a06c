"""TRL's SFTTrainer on conversations: what is trained, what is saved, and that the routers' losses count."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaForCausalLM

from mola.insight.telemetry import ExpertTelemetry
from tests.grids import slow

from .conftest import (
    KeepGradients,
    assert_only_the_adapter_was_trained_and_saved,
    assert_same_gradients,
    assistant,
    frozen,
    losses,
    settings,
    user,
)

ROUTER_LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
# TRL says that packed samples see each other without FlashAttention; it does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:trl")


def conversations():
    return [
        {"messages": [user(f"{i} and {i}?"), assistant(f"It is {2 * i}."), user("More" * (i % 3)), assistant("No.")]}
        for i in range(16)
    ]


@pytest.fixture
def make(trl, chat_tokenizer, base_and_config, tmp_path):
    """An SFTTrainer for conversations, training on the assistant's words only."""

    def build(start, callbacks=(), adapter=None, **options):
        model, peft_config = base_and_config(start, **(adapter or {}))
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**settings(tmp_path, max_length=64, assistant_only_loss=True, **options)),
            train_dataset=Dataset.from_list(conversations()),
            processing_class=chat_tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
        )

    return build


PACKING = {"no": {}, "wrapped": {"packing": True, "packing_strategy": "wrapped"}, "bfd": {"packing": True}}


@pytest.mark.parametrize(("start", "packing"), [("config", "no"), *slow(("ready", "wrapped"), ("config", "bfd"))])
def test_loss_falls_and_only_the_adapter_is_trained_and_saved(make, tmp_path, start, packing):
    trainer = make(start, adapter=ROUTER_LOSSES, **PACKING[packing])
    before = frozen(trainer.model)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert_only_the_adapter_was_trained_and_saved(trainer, before, tmp_path / "saved")


@pytest.mark.parametrize("packing", [*slow("no", "wrapped"), "bfd"])
def test_router_losses_reach_the_gradients(make, packing):
    """Those of a step are the gradients of the model's own loss, which contains them, on the same batch."""
    keep = KeepGradients()
    options = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1e-12, **PACKING[packing]}
    trainer = make("ready", callbacks=[keep], adapter=ROUTER_LOSSES, **options)
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: batches.append(collate(samples)) or batches[-1]
    trainer.train()
    [batch] = batches[:1]
    asked = (batch["labels"] != -100).float().mean()
    assert 0 < asked < 0.6, "the user's words are not trained"
    expected = {}
    for name, options in (("with", ROUTER_LOSSES), ("without", dict.fromkeys(ROUTER_LOSSES, 0.0))):
        model = trainer.model
        for option, value in options.items():
            setattr(model.peft_config["default"], option, value)
        model.zero_grad()
        model(**batch).loss.backward()
        expected[name] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(keep.steps[0], expected["with"])
    routers = [name for name in expected["with"] if "mola_router" in name]
    assert any((expected["with"][name] - expected["without"][name]).abs().max() > 1e-3 for name in routers)


@pytest.mark.parametrize("packing", [*slow("no"), "bfd"])
def test_telemetry_counts_every_token_once(make, tmp_path, packing):
    trainer = make("config", max_steps=4, logging_steps=2, gradient_accumulation_steps=2, **PACKING[packing])
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: batches.append(collate(samples)) or batches[-1]
    ExpertTelemetry(tmp_path / "routing.jsonl").add_to(trainer)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "routing.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
    per_step = len(masks) // 4
    assert lines[0]["tokens"] == sum(int(mask.sum()) for mask in masks[: 2 * per_step])
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("experts/balance" in entry for entry in entries)


@pytest.mark.slow
def test_resumed_run_is_the_same(make, tmp_path):
    adapter = {**ROUTER_LOSSES, "lora_dropout": 0.1}
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "adapter": adapter}
    whole = make("config", **options)
    whole.train()
    part = make("config", **options)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(part)[3:] == losses(whole)[3:]
    for (name, one), two in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.slow
def test_saved_adapter_answers_as_trained(make, tmp_path, tiny_model_dir, chat_tokenizer):
    trainer = make("config", adapter={"init_lora_weights": True}, max_steps=100)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    ids = chat_tokenizer.apply_chat_template([user("3 and 3?")], add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert chat_tokenizer.decode(answer) == "It is "

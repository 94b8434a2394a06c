"""TRL's DPOTrainer without a reference model: the adapter switched off, or a copy of it, is the reference."""

import math

import pytest
import torch
from datasets import Dataset

from mola import MolaError, MolaLinear
from tests.grids import slow
from tests.versions import needs

from .conftest import assert_only_the_adapter_was_trained_and_saved, assistant, frozen, losses, settings, user

IN_ONE = needs("trl", "1.15", "its models gave no log-probabilities: router losses are left out with a warning")
pytestmark = needs("trl", "0.27", "its DPO reads `warnings_issued`, which models of Transformers 5 do not have")


def preferences():
    return [
        {"prompt": [user(f"{i}?")], "chosen": [assistant(f"Yes, {i}.")], "rejected": [assistant("No" * (1 + i % 3))]}
        for i in range(16)
    ]


@pytest.fixture
def make(trl, chat_tokenizer, base_and_config, tmp_path):
    def build(start, adapter=None, **options):
        model, peft_config = base_and_config(start, **(adapter or {}))
        return trl.DPOTrainer(
            model=model,
            ref_model=None,
            args=trl.DPOConfig(**settings(tmp_path, max_length=64, beta=0.5, **options)),
            train_dataset=Dataset.from_list(preferences()),
            processing_class=chat_tokenizer,
            peft_config=peft_config,
        )

    return build


@pytest.mark.parametrize("start", [*slow("config"), "ready"])
def test_loss_falls_and_only_the_adapter_is_trained_and_saved(make, tmp_path, start):
    trainer = make(start)
    assert ("ref" in trainer.model.peft_config) is (start == "ready")
    before = frozen(trainer.model)
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > max(0.0, margins[0])
    assert_only_the_adapter_was_trained_and_saved(trainer, before, tmp_path / "saved")


@pytest.mark.parametrize(("start", "new"), [("config", True), ("ready", False)])
def test_reference_is_what_the_adapter_started_from(make, start, new):
    """Experts that change nothing yet, or a copy of those that do: no reward at first, and a loss of log 2."""
    trainer = make(start, adapter={"init_lora_weights": new}, max_steps=1)
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("loss", ["router_aux_loss_coef", *slow("router_z_loss_coef")])
@IN_ONE
def test_router_losses_are_refused(make, loss):
    with pytest.raises(MolaError, match="`router_aux_loss_coef` and `router_z_loss_coef` must be 0"):
        make("config", adapter={loss: 0.1}).train()


def test_adapter_that_was_made_with_router_losses_is_trained_without(make):
    trainer = make("ready", adapter={"router_aux_loss_coef": 0.1}, max_steps=1)
    for adapter in trainer.model.peft_config.values():
        adapter.router_aux_loss_coef = 0.0
    trainer.train()
    assert math.isfinite(losses(trainer)[0])


@IN_ONE
def test_reference_pass_adds_no_router_loss(make, tiny_model, chat_tokenizer):
    """In training mode, as the trainer runs it: the base model's values, and nothing kept of the routers."""
    trainer = make("config", adapter={"router_aux_loss_coef": 0.1})
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = inputs["input_ids"]
    policy = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    assert any(module.router_outputs for module in model.modules() if isinstance(module, MolaLinear))
    with torch.no_grad(), model.disable_adapter():
        reference = model(**inputs, labels=labels, fused_lm_head=True).log_probs
        plain = tiny_model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]
    torch.testing.assert_close(reference, plain, atol=1e-4, rtol=1e-4)
    assert (policy - reference).abs().max() > 0.1
    assert not any(module.router_outputs for module in model.modules() if isinstance(module, MolaLinear))
    with pytest.raises(MolaError, match="No router has run"):
        model.get_balance_loss()

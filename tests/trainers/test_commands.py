"""What commands make of adapters that other programs trained: there is no `run.json`, but maybe a chat template."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from mola.cli import main
from mola.reporting.doctor import DoctorOptions, doctor
from mola.reporting.load_run import load_run
from mola.reporting.report import ReportOptions, report

from .conftest import CHAT_TEMPLATE, assistant, config, settings, user

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:trl")


@pytest.fixture(scope="module")
def saved_by_trl(tiny_model_dir, tmp_path_factory):
    """The folder that SFTTrainer leaves: the adapter, its tokenizer, and checkpoints at steps 3 and 6."""
    trl = pytest.importorskip("trl", reason="needs the extra 'trl': pip install 'mola-peft[trl]'")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("trl") / "sft"
    options = settings(folder, max_steps=6, save_strategy="steps", save_steps=3, max_length=64)
    rows = [{"messages": [user(f"{i} and {i}?"), assistant(f"It is {2 * i}.")]} for i in range(8)]
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(tiny_model_dir),
        args=trl.SFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def by_trl(saved_by_trl, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(saved_by_trl, tmp_path / "sft"))


@pytest.fixture
def lora(tiny_model_dir, chat_tokenizer, tmp_path):
    """A LoRA as PEFT saves it, with a tokenizer beside it."""
    folder = tmp_path / "lora"
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def answer(adapter, base_model, capsys, **options):
    words = {"base_model": base_model, "adapter": adapter, "max_new_tokens": 3, "device": "cpu", **options}
    assert main(["generate", *(f"--{name}={value}" for name, value in words.items())]) == 0
    return capsys.readouterr().out


def test_an_adapter_of_trl_is_generated_with_reported_on_and_checked(by_trl, tiny_model_dir, capsys, caplog):
    said = answer(by_trl, tiny_model_dir, capsys, instruction="1 and 1?")
    assert said == answer(by_trl, tiny_model_dir, capsys, instruction="1 and 1?", template="chat")
    assert "template" not in caplog.text

    page = report(ReportOptions(str(by_trl))).read_text(encoding="utf-8")
    entries = json.loads((by_trl / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    run = load_run(str(by_trl))
    assert run.curves == {"training": losses}
    assert len(losses) == run.record["steps"] == 6
    assert run.record["trainable_parameters"] == sum(
        layer.expert_values + layer.router_values for layer in run.adapter.layers
    )
    assert "The steps and losses are from <code>checkpoint-6/trainer_state.json</code>" in page
    assert "12 LoRA experts per kind of module in 4 layers on tiny-llama" in page
    assert "callback <code>mola.insight.telemetry.ExpertTelemetry</code>" in page

    assert main(["doctor", str(by_trl)]) == 0
    printed = capsys.readouterr().out
    assert "Nothing was found wrong" in printed
    assert "Not looked at: whether the training ended well, and its settings and data (no run.json" in printed
    assert "the training loss" not in printed
    for folder in by_trl.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert main(["doctor", str(by_trl)]) == 0
    assert "fewer than 4 entries in trainer_state.json, which the trainer saves" in capsys.readouterr().out
    assert "neither the folder nor a checkpoint-N in it has a <code>trainer_state.json</code>" in report(
        ReportOptions(str(by_trl))
    ).read_text(encoding="utf-8")


def test_a_rising_loss_in_the_trainer_state_is_found(by_trl):
    path = by_trl / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] = [
        {"step": step, "loss": loss, "learning_rate": 0.3} for step, loss in enumerate([1, 1, float("nan"), 9, 9, 9], 1)
    ]
    path.write_text(json.dumps(state))
    (found,) = doctor(DoctorOptions(str(by_trl)))
    assert (found.name, "0.3 now" in found.change) == ("learning rate too high", True)


def test_a_best_checkpoint_counts_if_its_weights_were_saved(by_trl):
    path = by_trl / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    for step, found in ((3, None), (6, "checkpoint-6")):
        path.write_text(json.dumps({**state, "best_model_checkpoint": f"elsewhere/checkpoint-{step}"}))
        assert load_run(str(by_trl)).record["best_checkpoint"] == found


def test_a_lora_of_peft_is_generated_with_reported_on_and_checked(lora, tiny_model_dir, capsys):
    said = answer(lora, tiny_model_dir, capsys, instruction="1 and 1?")
    assert said == answer(lora, tiny_model_dir, capsys, instruction="1 and 1?", template="chat")
    page = report(ReportOptions(str(lora))).read_text(encoding="utf-8")
    assert "The adapter is of type LORA" in page
    assert "A LORA adapter on" in page
    assert main(["doctor", str(lora)]) == 0
    printed = capsys.readouterr().out
    assert "Nothing was found wrong" in printed
    assert "routers" not in printed


def test_without_a_chat_template_the_template_is_alpaca(lora, tiny_model_dir, capsys, caplog):
    (lora / "chat_template.jinja").unlink()
    answer(lora, tiny_model_dir, capsys, instruction="1 and 1?")
    assert "does not record the prompt template of its training, so the template is alpaca" in caplog.text

"""The loss of free text: its numbers, its result file, and how the command chooses between loss and accuracy."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from mola import MolaConfig
from mola.data.encode import encode_untruncated
from mola.data.templates import get_template
from mola.errors import MolaError, NotFiniteError
from mola.evaluation.evaluate import EvaluateOptions, evaluate, main
from mola.evaluation.free_text import evaluate_loss
from mola.evaluation.resuming import AnswersFile
from mola.evaluation.scoring import loss_interval
from mola.studies.comparison.outcomes import LOSS

WORDS = ["Iron.", "Salt water", "Öl und Eis, sagt man", "", "A fern grows where it is damp. " * 3, "wool"]


def text_row(index):
    return {"id": f"row-{index}", "instruction": "Name one." + " Go on." * (index * 3 % 5), "output": WORDS[index]}


@pytest.fixture
def rows():
    return [{**text_row(index), "input": "", "answer": None, "num_choices": None} for index in range(len(WORDS))]


@pytest.fixture
def mixture(tiny_model, force):
    force("reference")
    config = MolaConfig(
        num_experts=3,
        r=2,
        top_k=2,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(tiny_model, config)


def row_losses(model, tokenizer, rows, template="alpaca"):
    """One row at a time, from all logits."""
    found = []
    for row in encode_untruncated(rows, tokenizer, get_template(template, tokenizer), None):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids).logits[0, -len(labels) :]
        found.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item())
    return found


@torch.no_grad()
def test_loss_is_the_one_of_the_formula(mixture, tiny_tokenizer, rows):
    result = evaluate_loss(mixture, tiny_tokenizer, rows, batch_size=4, show_progress=False)
    losses = row_losses(mixture, tiny_tokenizer, rows)
    sizes = [len(word.encode()) for word in WORDS]
    assert [sample["id"] for sample in result.samples] == [row["id"] for row in rows]
    assert [sample["loss"] for sample in result.samples] == pytest.approx(losses, rel=1e-5)
    assert [sample["tokens"] for sample in result.samples] == [size + 1 for size in sizes]  # a token per byte, and EOS
    assert [sample["bytes"] for sample in result.samples] == sizes
    assert (result.tokens, result.bytes, result.total) == (sum(sizes) + 6, sum(sizes), 6)
    assert result.loss == pytest.approx(sum(losses) / result.tokens, rel=1e-5)
    assert result.perplexity == math.exp(result.loss)
    assert result.loss_per_byte == pytest.approx(result.loss * result.tokens / result.bytes)
    low, high = result.interval_95
    assert low < result.loss < high


def test_loss_is_the_eval_loss_of_the_trainer(mixture, tiny_tokenizer, rows, tmp_path):
    dataset = encode_untruncated(rows, tiny_tokenizer, get_template("alpaca"), None)
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=6, report_to="none", use_cpu=True)
    collate = DataCollatorForSeq2Seq(tiny_tokenizer)
    trainer = Trainer(mixture, arguments, data_collator=collate, eval_dataset=dataset.remove_columns("length"))
    result = evaluate_loss(mixture, tiny_tokenizer, rows, show_progress=False)
    assert result.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_batches_change_no_sum_and_the_model_stays_as_it_was(mixture, tiny_tokenizer, rows):
    mixture.train()
    results = [
        evaluate_loss(mixture, tiny_tokenizer, rows, batch_size=size, show_progress=False).samples for size in (1, 4, 6)
    ]
    alone, *others = [[sample["loss"] for sample in samples] for samples in results]
    for losses in others:
        assert losses == pytest.approx(alone, rel=1e-5)
    assert mixture.training
    assert tiny_tokenizer.padding_side == "left"


@torch.no_grad()
def test_virtual_tokens_do_not_shift_the_logits(tiny_model, tiny_tokenizer, rows):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = get_peft_model(tiny_model, config).eval()
    result = evaluate_loss(model, tiny_tokenizer, rows, show_progress=False)
    assert result.settings["batch_size"] == 1
    expected = row_losses(model, tiny_tokenizer, rows)
    assert [sample["loss"] for sample in result.samples] == pytest.approx(expected, rel=1e-5)


# Leaves what stands before a "!" out of earlier answers, so each answer is a sample of its own.
FORGETFUL = (
    "{% for each in messages %}[{{ each.role }}]"
    "{{ each.content if loop.last else each.content.split('!')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_of_several_samples_is_one_row(tiny_model, tiny_tokenizer):
    tiny_tokenizer.chat_template = FORGETFUL
    contents = ["Where do ferns grow?", "Hm!In shade.", "And moss?", "Well!On stones."]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, contents, strict=True)]
    chats = [
        {"id": name, "instruction": None, "input": "", "output": contents[-1], "messages": messages} for name in "ab"
    ]
    result = evaluate_loss(tiny_model, tiny_tokenizer, chats, template="chat", batch_size=3, show_progress=False)
    size = len(contents[1] + contents[3])
    assert [(sample["id"], sample["tokens"], sample["bytes"]) for sample in result.samples] == [
        ("a", size + 2, size),
        ("b", size + 2, size),
    ]
    assert result.samples[0]["loss"] == pytest.approx(result.samples[1]["loss"], rel=1e-5)


class AllLogits(torch.nn.Module):
    """A model without `logits_to_keep`."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.generation_config = model, model.config, None

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids, attention_mask=attention_mask)


def test_models_that_compute_all_logits(tiny_model, tiny_tokenizer, rows):
    some, all_ = (
        evaluate_loss(model, tiny_tokenizer, rows, batch_size=3, show_progress=False).samples
        for model in (tiny_model, AllLogits(tiny_model))
    )
    assert [sample["loss"] for sample in all_] == pytest.approx([sample["loss"] for sample in some], rel=1e-5)


def test_a_loss_that_is_no_number_is_an_error(tiny_model, tiny_tokenizer, rows):
    tiny_model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="sample 'row-[0-9]' is nan"):
        evaluate_loss(tiny_model, tiny_tokenizer, rows, show_progress=False)


def test_a_perplexity_beyond_all_floats_is_infinite_and_null_in_the_file(tiny_model, tiny_tokenizer, rows):
    tiny_model.lm_head.weight.data.mul_(1e5)
    result = evaluate_loss(tiny_model, tiny_tokenizer, rows, show_progress=False)
    assert math.isfinite(result.loss)
    assert result.loss > 709
    assert result.perplexity == math.inf
    assert result.to_dict()["perplexity"] is None
    assert LOSS.texts(result.loss)[1] == "inf"


def test_interval_is_that_of_a_ratio_estimator():
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 60, 400)
    losses = tokens * generator.normal(2, 0.5, 400)
    low, high = loss_interval(losses, tokens)
    ratio = losses.sum() / tokens.sum()
    # Its standard error by linearisation, from the residuals.
    error = (losses - ratio * tokens).std(ddof=1) / math.sqrt(400) / tokens.mean()
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.3 * error)
    assert loss_interval(losses, tokens) == [low, high]
    assert loss_interval([6.0, 3.0, 9.0], [2, 1, 3]) == [3, 3]
    assert loss_interval([6.0], [2]) is None


@pytest.fixture
def free(options, tmp_path):
    """Options for free text in a file, without a task."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(text_row(index)) + "\n" for index in range(len(WORDS))), encoding="utf-8")
    words = {"task": None, "data": str(path), "max_new_tokens": EvaluateOptions.max_new_tokens, "batch_size": 2}
    return EvaluateOptions(**asdict(options) | words)


def test_rows_without_a_task_are_measured_by_their_loss(free, capsys):
    assert main(free) == 0
    written = json.loads(Path(free.output).read_text(encoding="utf-8"))
    assert set(written) == {
        *("loss", "perplexity", "loss_per_byte", "interval_95", "tokens", "bytes", "total", "samples"),
        *("settings", "versions", "data_fingerprint", "seconds", "machine"),
    }
    assert set(written["samples"][0]) == {"id", "loss", "tokens", "bytes"}
    assert written["settings"] == asdict(free) | {"template": "alpaca"}
    printed = capsys.readouterr().out
    for text in ("loss per token", f"{written['loss']:.4f}", f"{written['perplexity']:.4g}", "95 % interval", "alpaca"):
        assert text in printed


def test_a_task_without_answers_is_measured_by_its_loss(free, tmp_path):
    rows = [{"id": f"niv.{index}", "question": "What is it?", "response": word} for index, word in enumerate(WORDS[:2])]
    (tmp_path / "orca.json").write_text(json.dumps(rows))
    result = evaluate(replace(free, task="openorca", data=str(tmp_path / "orca.json")))
    assert result.settings["template"] == "meta"
    assert result.tokens == sum(len(f"What is it?\n{word}") + 1 for word in WORDS[:2])


def test_interrupted_evaluation_of_free_text_resumes(free, interrupt_after, tmp_path, caplog):
    whole = evaluate(replace(free, output=str(tmp_path / "whole.json")))
    interrupt_after(free)
    with pytest.raises(MolaError, match="template 'alpaca' there, 'meta' now"):
        evaluate(replace(free, template="meta"))
    resumed = evaluate(free)
    assert "Resuming with 2 finished samples" in caplog.text
    assert resumed.samples == whole.samples
    assert not AnswersFile(free.output, {}).path.exists()


@pytest.mark.parametrize("change", [{"scoring": "likelihood"}, {"max_new_tokens": 40}])
def test_options_for_answers_are_refused_for_free_text(change, free, no_weights_dir):
    free.base_model = str(no_weights_dir)
    (name,) = change
    with pytest.raises(MolaError, match=f"`{name}` .* is for questions with answers"):
        evaluate(replace(free, **change))


def test_a_row_too_long_for_the_model_is_refused_before_the_weights_are_read(free, no_weights_dir):
    Path(free.data).write_text(json.dumps({"id": "long", "instruction": "Go on.", "output": "la " * 400}) + "\n")
    with pytest.raises(MolaError, match="at most 1024 tokens.*'long'"):
        evaluate(replace(free, base_model=str(no_weights_dir)))


def test_prompts_and_end_token_are_those_of_the_adapters_training(free, tiny_model, tmp_path):
    folder = tmp_path / "adapter"
    get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"template": "meta", "settings": {"add_eos_token": False}}))
    rows = [text_row(index) for index in (0, 1)]
    Path(free.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(replace(free, adapter=str(folder)))
    assert result.settings["template"] == "meta"
    assert result.tokens == sum(len(row["output"]) for row in rows)

"""`mola evaluate`: its options, what it prints, and what is refused before the weights are read."""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mola.evaluation.resuming as resuming
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, check_evaluation, evaluate, main


def test_evaluation_with_an_adapter_differs_from_the_base(options, tiny_model, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    options.output = None
    before = [sample["output"] for sample in evaluate(options).samples]
    options.adapter = str(tmp_path / "adapter")
    assert [sample["output"] for sample in evaluate(options).samples] != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "`batch_size`.*0"),
        ({"seed": -1}, "`seed` must be a whole number from 0 .*: got -1"),
        ({"dtype": "half"}, "half"),
        ({"device": "tpu9"}, "tpu9"),
        ({"scoring": "guess"}, "guess"),
        ({"template": "nope"}, "nope"),
        ({"task": "nope"}, "nope"),
        ({"data": "missing.json"}, "missing"),
        ({"adapter": "missing"}, "no such folder"),
        ({"output": "/proc/nope/result.json"}, "cannot be written"),
        ({"max_new_tokens": 1000}, r"1024 positions: sample 'test-0' has \d+ prompt tokens, and 1000"),
    ],
)
def test_wrong_options_are_refused_before_the_weights_are_read(change, message, options, no_weights_dir):
    wrong = EvaluateOptions(**asdict(options) | {"base_model": str(no_weights_dir)} | change)
    with pytest.raises(MolaError, match=message):
        evaluate(wrong)


def test_prompts_are_those_of_the_training_and_others_are_warned_of(options, tiny_model, tmp_path, caplog):
    get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    options.adapter = str(tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"template": "meta"}), encoding="utf-8")
    for asked, used in ((None, "meta"), ("meta", "meta"), ("alpaca", "alpaca")):
        caplog.clear()
        checked = check_evaluation(EvaluateOptions(**asdict(options) | {"template": asked}))
        assert checked.template.name == used
        is_said = "trained with the prompt template meta and is used with alpaca." in caplog.text
        assert is_said == (used == "alpaca")


def test_answers_of_another_dtype_are_not_used_again(options, monkeypatch):
    """That of "auto" depends on the machine."""
    checked = check_evaluation(options)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(resuming, "resolve_dtype", lambda *_, dtype=dtype: (dtype, "as chosen here"))
        found.append(resuming.answers_made_with(options, checked.task, "alpaca", checked.examples))
    assert found[0] != found[1]


def test_a_name_too_long_for_the_file_of_answers_is_refused(options, no_weights_dir):
    options.base_model = str(no_weights_dir)
    options.output = str(Path(options.output).with_name("r" * 245 + ".json"))
    with pytest.raises(MolaError, match="cannot be written"):
        evaluate(options)


def test_limit_takes_the_first_samples(options):
    options.limit = 3
    assert [sample["id"] for sample in evaluate(options).samples] == ["test-0", "test-1", "test-2"]


def test_command_prints_a_table_and_returns_zero(options, capsys):
    assert main(options) == 0
    printed = capsys.readouterr().out
    for text in ("accuracy", "physics", "unanswered", "11"):
        assert text in printed


PAIR_TASK = """
name: pair
version: 1
template: meta
columns: [text, label]
answer: {column: label, words: {0: "n", 1: "y"}}
instruction: "{text}"
output: "{answer}"
answer_pattern: '^([ny])'
metric: accuracy
more_metrics: [matthews, f1]
"""


@pytest.fixture
def pair_options(options, tmp_path):
    """The tiny model on short texts with two labels, by likelihood: it says y to some and n to others."""
    data, task = tmp_path / "pairs.json", tmp_path / "pair.yaml"
    data.write_text(json.dumps([{"text": f"{index} boats" * index, "label": index % 3 % 2} for index in range(1, 25)]))
    task.write_text(PAIR_TASK)
    return EvaluateOptions(**asdict(options) | {"task": str(task), "data": str(data), "scoring": "likelihood"})


def test_metrics_of_the_task_are_in_the_result_and_the_table(pair_options, capsys):
    assert main(pair_options) == 0
    written = json.loads(Path(pair_options.output).read_text())
    pairs = [(sample["answer"], sample["predicted"]) for sample in written["samples"]]
    tp, fp, fn, tn = (pairs.count(pair) for pair in [("y", "y"), ("n", "y"), ("y", "n"), ("n", "n")])
    assert min(tp, fp, fn, tn) > 0
    assert written["metrics"] == pytest.approx(
        {
            "matthews": (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
            "f1": 2 * tp / (2 * tp + fp + fn),
        }
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert f"matthews {written['metrics']['matthews']:.3f}, f1 {written['metrics']['f1']:.3f}, 0 unanswered" in printed


def test_a_length_of_answers_that_are_not_generated_is_warned_of(pair_options, caplog):
    pair_options.max_new_tokens = 40
    assert main(pair_options) == 0
    assert "`max_new_tokens` is not used" in caplog.text


def test_answers_of_another_task_are_refused_before_the_weights_are_read(pair_options, no_weights_dir):
    rows = [{"instruction": "x", "output": f"Answer: The answer is {word}.", "answer": word} for word in ("y", "Y")]
    Path(pair_options.data).write_text(json.dumps(rows))
    pair_options.base_model, pair_options.scoring = str(no_weights_dir), "generate"
    with pytest.raises(MolaError, match="`answer` of sample 'test-1' must be one of 'n', 'y' .*got 'Y'"):
        evaluate(pair_options)


def test_every_option_has_help():
    assert all(field.metadata.get("help") for field in fields(EvaluateOptions))

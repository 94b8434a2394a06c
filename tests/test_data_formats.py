"""Data in the formats that people have, in the commands that measure a model; none of them needs a task."""

import csv
import json

import pytest

from mola import MolaConfig
from mola.allocation.allocate import allocate
from mola.allocation.options import AllocateOptions
from mola.evaluation.evaluate import evaluate
from mola.evaluation.options import EvaluateOptions
from mola.exporting.convert import convert
from mola.exporting.options import ConvertOptions
from mola.reporting.inspect import inspect
from mola.reporting.options import InspectOptions
from tests.conftest import save_adapter

TURNS = [
    [("user", "Where do ferns grow?"), ("assistant", "In shade."), ("user", "And moss?"), ("assistant", "On stones.")],
    [("system", "Be brief."), ("user", "Name a metal."), ("assistant", "Iron, or zinc.")],
]
PAIRS = [("Where do ferns grow?", "In shade."), ("Name a metal.", "Iron, or zinc.")]
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}


def chat(turns):
    return [{"role": role, "content": text} for role, text in turns]


# Name of the format -> rows, bytes of the answers, and number of answers.
ANSWERS = sum(len(answer) for _, answer in PAIRS)
FORMATS = {
    "messages": ([{"messages": chat(turns)} for turns in TURNS], ANSWERS + len("On stones."), 3),
    "conversations": (
        [{"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in turns]} for turns in TURNS],
        ANSWERS + len("On stones."),
        3,
    ),
    "prompt and completion": ([{"prompt": ask, "completion": answer} for ask, answer in PAIRS], ANSWERS, 2),
    "prompt and completion as messages": (
        [{"prompt": chat(turns[:-1]), "completion": chat(turns[-1:])} for turns in TURNS],
        len("On stones.") + len("Iron, or zinc."),
        2,
    ),
    "text": ([{"text": f"{ask} {answer}"} for ask, answer in PAIRS], sum(len(f"{a} {b}") for a, b in PAIRS), 2),
    "instruction, input, output": (
        [{"instruction": "Answer.", "input": ask, "output": answer} for ask, answer in PAIRS],
        ANSWERS,
        2,
    ),
    "question and answer": ([{"question": ask, "answer": answer} for ask, answer in PAIRS], ANSWERS, 2),
}
CHOICES = [
    {"question": "Which one is a metal?", "choices": ["zinc", "moss"], "answer": 0},
    {"question": "Which one grows?", "choices": ["zinc", "moss", "ice"], "answer": 1},
]


def write(rows, folder, ending):
    path = folder / f"mine.{ending}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        if ending == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture(scope="module")
def adapter(small_model_dir, tmp_path_factory):
    config = MolaConfig(num_experts=3, r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return str(save_adapter(small_model_dir, tmp_path_factory.mktemp("adapter"), config))


@pytest.mark.parametrize(
    ("name", "ending"),
    [*((name, "jsonl") for name in FORMATS), ("question and answer", "csv")],
)
def test_loss_of_a_format(name, ending, small_model_dir, tmp_path):
    rows, size, answers = FORMATS[name]
    options = EvaluateOptions(str(small_model_dir), data=write(rows, tmp_path, ending), device="cpu", dtype="float32")
    result = evaluate(options)
    assert (result.total, result.bytes) == (2, size)
    assert result.tokens == size + answers  # one token for a byte, and the one that ends an answer


def test_rows_with_choices_are_scored(small_model_dir, tmp_path):
    data = write(CHOICES, tmp_path, "jsonl")
    result = evaluate(EvaluateOptions(str(small_model_dir), data=data, device="cpu", scoring="likelihood"))
    assert [sample["answer"] for sample in result.samples] == ["A", "B"]
    assert result.total == 2


@pytest.mark.parametrize("name", ["messages", "text"])
def test_a_format_in_other_commands(name, small_model_dir, adapter, tmp_path):
    rows = FORMATS[name][0]
    data, base = write(rows, tmp_path, "jsonl"), str(small_model_dir)
    targets = {"target_modules": "q_proj,down_proj"}
    assert allocate(AllocateOptions(base, "gradient", 4, data=data, **targets)).num_experts == [4]
    found = inspect(InspectOptions(base, adapter, data=data, device="cpu"))
    assert found["samples"] == 2
    assert "Iron, or zinc." in found["examples"][-1]["answer"]
    lora = tmp_path / "lora"
    flags = {"target_format": "lora", "rank": 4, "base_model": base, "device": "cpu", "dtype": "float32"}
    report = convert(ConvertOptions([adapter], str(lora), data=[data], test=data, **flags))
    assert report.rows == {"answer": {"fitted": 1, "held_out": 1}, "test answer": {"fitted": 0, "held_out": 2}}
    assert report.divergence["test answer"] > 0

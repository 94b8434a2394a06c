"""Eleven questions with two to five choices, and the options to ask the tiny model."""

import json

import pytest

from mola.data.examples import load_examples
from mola.data.tasks import load_task
from mola.evaluation.evaluate import EvaluateOptions

SUBJECTS = ["physics", "biology"]


def raw_row(index):
    choices = ["iron", "a fern", "the sea", "ice", "wool"][: 2 + index % 4]
    return {
        "question": "Which one is it?" + " Think." * (index * 5 % 7),
        "choices": choices,
        "answer": index % len(choices),
        "hint": "",
        "subject": SUBJECTS[index % 2],
        "topic": "matter",
        "grade": f"grade{index % 3}",
    }


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([raw_row(index) for index in range(11)]))
    return path


@pytest.fixture
def task():
    return load_task("scienceqa")


@pytest.fixture
def examples(data, task):
    return load_examples(data, task, "test")


@pytest.fixture
def options(tiny_model_dir, data, tmp_path):
    return EvaluateOptions(
        base_model=str(tiny_model_dir),
        task="scienceqa",
        data=str(data),
        batch_size=4,
        max_new_tokens=5,
        dtype="float32",
        device="cpu",
        output=str(tmp_path / "out" / "result.json"),
    )

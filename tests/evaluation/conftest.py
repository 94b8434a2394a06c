"""Eleven questions with two to five choices, and the options to ask the tiny model."""

import json

import pytest

from mola.data.examples import load_examples
from mola.data.tasks import load_task
from mola.evaluation.evaluate import EvaluateOptions, evaluate
from mola.evaluation.resuming import AnswersFile

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


@pytest.fixture
def interrupt_after(monkeypatch):
    """Function that runs `evaluate` and stops it, as Ctrl-C would, after some batches were saved."""

    def run(options, num_batches=1):
        append, calls = AnswersFile.append, []

        def stopping(self, records):
            append(self, records)
            calls.append(len(list(records)))
            if len(calls) == num_batches:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(AnswersFile, "append", stopping)
            with pytest.raises(KeyboardInterrupt):
                evaluate(options)

    return run

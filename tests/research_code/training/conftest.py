"""A training script that runs for a few steps, in its own working folder and without a tracker."""

import shutil

import pytest

from tests.research_code.scripts import run_script, write_dataset
from tests.research_code.training.runs import TRAIN


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No tracker from the environment; the scripts' default paths are relative to the working folder."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def saved_questions(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "science_qa.hf", {"train": 13, "validation": 3, "test": 3})


@pytest.fixture
def command(tmp_path, tiny_model_dir, saved_questions, monkeypatch):
    """A function that runs the training script for a few steps in `tmp_path/run`; its arguments are further flags."""
    data = shutil.copytree(saved_questions, tmp_path / "science_qa.hf")

    def run(script=TRAIN, **flags):
        settings = {
            "base_model": tiny_model_dir,
            "data_path": data,
            "output_dir": tmp_path / "run",
            "batch_size": 4,
            "micro_batch_size": 2,
            "val_set_size": 1,
            "dtype": "float32",
            "number_experts": "2,2,3,3",
            "cutoff_len": 512,
            "learning_rate": 1e-2,
            **flags,
        }
        words = [f"--{name}={value}" for name, value in settings.items() if value is not None]
        return run_script(script, monkeypatch, *words)

    return run


@pytest.fixture(scope="session")
def finished_runs():
    """At most one folder: the run that `finished` copies."""
    return []


@pytest.fixture
def finished(command, tmp_path, finished_runs, tmp_path_factory):
    """`tmp_path/run` as `command()` leaves it: trained once, copied for every test."""
    folder = tmp_path / "run"
    if finished_runs:
        return shutil.copytree(finished_runs[0], folder)
    assert command() == 0
    finished_runs.append(shutil.copytree(folder, tmp_path_factory.mktemp("finished") / "run"))
    return folder

"""Flags and variables of the tracker, with and without its package."""

import importlib.util
import logging
import os

from research_code.training_options import ResearchTrainOptions

from research_code.training import tracker_environment
from tests.research_code.training.runs import record


def test_missing_tracker_is_a_warning(command, tmp_path, caplog, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    assert command(wandb_project="2024", wandb_run_name="first") == 0
    assert "wandb is not installed" in caplog.text
    assert record(tmp_path / "run")["settings"]["report_to"] in ([], "none", ["none"])


def test_no_tracker_unless_named(command, tmp_path, monkeypatch):
    assert command() == 0
    assert record(tmp_path / "run")["settings"]["report_to"] in ([], "none", ["none"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    environment = tracker_environment(ResearchTrainOptions(wandb_watch="gradients"))
    assert environment == {"WANDB_PROJECT": "from-the-environment", "WANDB_WATCH": "gradients"}


def test_variables_of_the_tracker_are_set_and_shown(command, monkeypatch, caplog):
    """The package is not needed to see what the run would start with."""
    seen = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    # Registered, so that they are as before after the test.
    monkeypatch.setenv("WANDB_PROJECT", "other")
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")

    def start(settings):
        seen.update(os.environ)
        return 0

    monkeypatch.setattr("research_code.training.TrainOptions", dict)
    monkeypatch.setattr("research_code.training.train_main", start)
    with caplog.at_level(logging.INFO, "mola"):
        assert command(wandb_project="my project", wandb_log_model="checkpoint") == 0
    assert (seen["WANDB_PROJECT"], seen["WANDB_LOG_MODEL"]) == ("my project", "checkpoint")
    assert "The same as: WANDB_PROJECT='my project' WANDB_LOG_MODEL=checkpoint mola train " in caplog.text

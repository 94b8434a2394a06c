"""Flags and variables of the tracker, with and without its package."""

import importlib.util
import logging
import os

import pytest
from research_code.training_options import ResearchTrainOptions

from research_code.training import tracker_environment
from tests.research_code.training.runs import record


@pytest.fixture
def started(monkeypatch):
    """The options of every run that the script would start; nothing is trained."""
    runs = []
    monkeypatch.setattr("research_code.training.TrainOptions", dict)
    monkeypatch.setattr("research_code.training.train_main", lambda options: runs.append(options) or 0)
    return runs


def test_missing_tracker_is_a_warning(command, started, caplog, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    assert command(wandb_project="2024", wandb_run_name="first") == 0
    assert "wandb is not installed" in caplog.text
    assert [(options["report_to"], options["run_name"]) for options in started] == [("none", None)]


def test_no_tracker_unless_named(finished, monkeypatch):
    assert record(finished)["settings"]["report_to"] in ([], "none", ["none"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    environment = tracker_environment(ResearchTrainOptions(wandb_watch="gradients"))
    assert environment == {"WANDB_PROJECT": "from-the-environment", "WANDB_WATCH": "gradients"}


def test_variables_of_the_tracker_are_set_and_shown(command, started, monkeypatch, caplog):
    """The package is not needed to see what the run would start with."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    # These two calls make pytest restore the variables after the test.
    monkeypatch.setenv("WANDB_PROJECT", "other")
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")

    with caplog.at_level(logging.INFO, "mola"):
        assert command(wandb_project="my project", wandb_log_model="checkpoint") == 0
    assert [options["report_to"] for options in started] == ["wandb"]
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_LOG_MODEL"]) == ("my project", "checkpoint")
    assert "The same as: WANDB_PROJECT='my project' WANDB_LOG_MODEL=checkpoint mola train " in caplog.text

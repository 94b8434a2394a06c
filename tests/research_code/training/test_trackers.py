"""Flags and variables of the tracker, with and without its package."""

import dataclasses
import importlib.util
import logging
import os

from mola.research_code.trackers import tracker_environment
from mola.research_code.training import train_settings
from mola.research_code.training_options import ResearchTrainOptions
from tests.research_code.scripts import write_dataset
from tests.research_code.training.runs import record


def test_missing_tracker_is_a_warning(command, tmp_path, caplog, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    assert command(wandb_project="2024", wandb_run_name="first") == 0
    assert "wandb is not installed" in caplog.text
    assert record(tmp_path / "run")["settings"]["report_to"] in ([], "none", ["none"])


def test_no_tracker_unless_named(tmp_path, monkeypatch):
    options = ResearchTrainOptions(data_path=str(write_dataset(tmp_path / "data.hf", {"train": 4})))
    assert train_settings(options)["report_to"] == "none"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    options = dataclasses.replace(options, wandb_run_name="first", wandb_watch="gradients")
    before = dict(os.environ)
    settings = train_settings(options)
    assert (settings["report_to"], settings["run_name"]) == ("wandb", "first")
    assert tracker_environment(options) == {"WANDB_PROJECT": "from-the-environment", "WANDB_WATCH": "gradients"}
    assert dict(os.environ) == before  # a function that makes settings changes nothing


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

    monkeypatch.setattr("mola.research_code.training.TrainOptions", dict)
    monkeypatch.setattr("mola.research_code.training.train_main", start)
    with caplog.at_level(logging.INFO, "mola"):
        assert command(wandb_project="my project", wandb_log_model="checkpoint") == 0
    assert (seen["WANDB_PROJECT"], seen["WANDB_LOG_MODEL"]) == ("my project", "checkpoint")
    assert "The same as: WANDB_PROJECT='my project' WANDB_LOG_MODEL=checkpoint mola train " in caplog.text

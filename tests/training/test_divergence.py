"""A loss or a weight that is no number any more stops the run; an evaluation loss far above the other is said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from mola import TrainOptions
from mola.cli import main
from mola.errors import MolaError
from mola.reporting.findings import find_training_fault
from mola.reporting.load_run import Run
from mola.training.callbacks import FiniteLoss, overflow_explained
from tests.grids import slow
from tests.training.runs import NO_EVALUATION, WEIGHTS, losses, read_metrics, read_record


@pytest.mark.parametrize("logging_steps", [*slow(1), 50])
def test_divergence_stops_the_run_and_leaves_finite_checkpoints(flags, tmp_path, error_line, logging_steps):
    """The loss is finite until the second step; without a log entry the weights tell."""
    line = error_line(
        flags(
            learning_rate=1e30,
            warmup_steps=0,
            lr_scheduler_type="constant",
            logging_steps=logging_steps,
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="no",
        )
    )
    assert "diverged" in line
    assert " at step " in line
    assert f"--adapter {tmp_path / 'run' / 'checkpoint-1'} in another `output`" in line
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed"
    assert "diverged" in record["error"]
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-1"]
    assert all(torch.isfinite(weight).all() for weight in load_file(checkpoints[0] / WEIGHTS).values())
    read_metrics(tmp_path / "run")
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_divergence_after_the_last_log_entry_is_noticed(flags, error_line):
    line = error_line(flags(learning_rate=1e30, warmup_steps=0, logging_steps=50, num_train_epochs=3, **NO_EVALUATION))
    assert "`train_loss` is nan at step 9" in line


def test_weights_after_the_last_step_are_checked_without_checkpoints(flags, tmp_path, error_line):
    """Its loss is from before the step."""
    line = error_line(flags(learning_rate=1e39, warmup_steps=0, max_steps=1, **NO_EVALUATION))
    assert "weight " in line
    assert "is no longer finite at step 1" in line
    assert not (tmp_path / "run" / WEIGHTS).exists()


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 1e39}, *slow({"learning_rate": 1e37, "loraplus_lr_ratio": 1e3})],
)
def test_overflow_of_an_optimiser_step_is_explained(flags, tmp_path, error_line, options):
    """AdamW that is not fused cannot compute it at all."""
    settings = {"optim": "adamw_torch", "warmup_steps": 0, "max_steps": 1, **NO_EVALUATION, **options}
    line = error_line(flags(**settings))
    assert "the step of the optimiser overflows at step 0: training has diverged. Lower `learning_rate`" in line
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed"
    assert "overflows" in record["error"]


def test_overflow_in_half_precision_is_not_explained_as_an_optimiser_step():
    with pytest.raises(RuntimeError, match="without overflow"), overflow_explained(None):
        torch.zeros(1, dtype=torch.float16).masked_fill(torch.ones(1, dtype=torch.bool), 1e39)


def test_finite_loss_lets_finite_values_pass(tiny_model_dir, tmp_path):
    options = TrainOptions(base_model=str(tiny_model_dir), output_dir=str(tmp_path), dtype="float32")
    FiniteLoss().on_log(options, None, None, logs={"loss": 1.0, "learning_rate": float("nan")})
    with pytest.raises(MolaError, match="`eval_loss` is inf at step 3"):
        FiniteLoss().on_log(options, TrainerState(global_step=3), None, logs={"eval_loss": float("inf")})


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (True, {"load_best_model_at_end": "false", "save_strategy": "no"}),
        *slow(
            (False, {"load_best_model_at_end": "true"}),  # best weights
            (False, {"load_best_model_at_end": "false", "eval_data": None}),  # same answers
        ),
    ],
)
def test_evaluation_loss_far_above_training_loss_is_warned_of(flags, rows_file, tmp_path, caplog, said, options):
    """Ten epochs learn one answer by heart; an evaluation on another answer gets worse with every one."""
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    other, folder = tmp_path / "other.json", tmp_path / "run"
    other.write_text(json.dumps([{**row, "output": "zzzz zzzz"} for row in rows]), encoding="utf-8")
    settings = {"eval_data": other, "num_train_epochs": 10, "lr_scheduler_type": "constant", **options}
    if settings["eval_data"] is None:
        settings["validation_size"] = 3
    assert main(flags(folder, **settings)) == 0
    record = read_record(folder)
    lines = [message for message in caplog.messages if "far above training loss" in message]
    assert lines == ([record["warning"]] if said else [])
    assert ("far above" in str(record["warning"])) is said
    if said:
        last = [loss for step, loss in losses(folder).items() if step > 27]
        train_loss, eval_loss = sum(last) / len(last), record["metrics"]["eval_loss"]
        assert f"{eval_loss:.4f} at step 30, training {train_loss:.4f}." in lines[0]
        assert "--learning_rate" in lines[0]


@pytest.mark.parametrize(
    ("logged", "eval_loss", "is_far"),
    [
        ({5: 0.9, 10: 0.02}, 0.51, False),  # overfitted by less than 0.5
        ({5: 0.9, 10: 0.02}, 0.53, True),
        ({5: 2.5, 10: 1.0}, 1.9, False),  # less than twice as high
        ({5: 2.5, 10: 1.0}, 2.1, True),
        ({95: 2.0, 100: 0.02}, 1.5, False),  # the last entry alone is one lucky batch
        ({}, 9.0, False),  # nothing to compare with
    ],
)
def test_far_above_means_twice_and_half_a_nat_above(logged, eval_loss, is_far):
    curves = {"training": [*logged.items()], "evaluation": [(max(logged, default=1), eval_loss)]}
    found = find_training_fault(Run(Path(), {"settings": {}, "status": "running"}, curves))
    assert (found is not None) is is_far


def test_a_run_that_has_not_learnt_says_so_with_what_to_change(flags, tmp_path, caplog, capsys):
    short = {"learning_rate": 1e-5, "logging_steps": None, "num_train_epochs": 4, **NO_EVALUATION}
    assert main(flags(**short)) == 0
    record = read_record(tmp_path / "run")
    assert record["warning"] == next(each for each in caplog.messages if each.startswith("Not learnt: "))
    assert "Pass --learning_rate 3e-05 (1e-05 now), or --num_train_epochs 8 (4 now)." in record["warning"]
    assert len(losses(tmp_path / "run")) == record["steps"]  # a short run logs each step
    capsys.readouterr()
    assert main(["doctor", str(tmp_path / "run")]) == 0
    assert "1. not learnt\n   The training loss has hardly fallen: from " in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "The training loss has hardly fallen" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")

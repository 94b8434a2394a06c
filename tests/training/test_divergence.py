"""A loss or a weight that is no number any more stops the run."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from mola import TrainOptions
from mola.errors import MolaError
from mola.training.callbacks import FiniteLoss
from tests.training.runs import NO_EVALUATION, WEIGHTS, read_metrics, read_record


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_divergence_stops_with_one_line_and_leaves_good_checkpoints(flags, tmp_path, error_line, logging_steps):
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
    assert f"--adapter {tmp_path / 'run' / 'checkpoint-1'} in another `output_dir`" in line
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


def test_finite_loss_lets_finite_values_pass(tiny_model_dir, tmp_path):
    options = TrainOptions(base_model=str(tiny_model_dir), output_dir=str(tmp_path), dtype="float32")
    FiniteLoss().on_log(options, None, None, logs={"loss": 1.0, "learning_rate": float("nan")})
    with pytest.raises(MolaError, match="`eval_loss` is inf at step 3"):
        FiniteLoss().on_log(options, TrainerState(global_step=3), None, logs={"eval_loss": float("inf")})

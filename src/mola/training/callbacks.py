"""What happens during a run besides training: the loss curve file, time, checkpoints, the finite-loss check."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mola.errors import NotFiniteError
from mola.files.atomic import append_lines, atomic_write_text
from mola.files.reading import select_lines
from mola.training.checkpoints import newest_complete, rotate
from mola.training.zero import gathered

logger = logging.getLogger(__name__)

_EPOCH_TOLERANCE = 1e-6  # far below one step of the longest epoch, far above rounding


class MetricsFile(TrainerCallback):
    """Appends every log entry to a JSON lines file; a resumed run keeps the lines up to its step.

    `checkpoint` is the one that a run goes on from; it may be in another folder.
    """

    def __init__(self, path: Path, checkpoint: Path | None = None) -> None:
        self.path = path
        self._before = path if checkpoint is None else checkpoint.parent / path.name  # maybe another run's

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop lines that the resumed part of the run will write again."""
        if not state.is_world_process_zero:
            return
        kept = select_lines(self._before, _written_by(state.global_step)) if state.global_step else []
        atomic_write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line at once, so that an interrupted run has its curve."""
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step, "epoch": state.epoch, **logs}
            # JSON has no NaN; a reader finds null instead.
            entry = {key: None if _is_not_finite(value) else value for key, value in entry.items()}
            append_lines(self.path, [json.dumps(entry, allow_nan=False)])


def _written_by(step: int) -> Callable[[dict[str, Any]], bool]:
    """Whether a line was written by step `step`: no summary of an ended run, nor the evaluation that follows it."""
    ended = False

    def keep(entry: dict[str, Any]) -> bool:
        nonlocal ended
        ended = ended or "train_loss" in entry
        return not ended and entry["step"] <= step

    return keep


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class TrainingClock(TrainerCallback, ExportableState):
    """Wall time of training; a resumed run goes on counting from what its checkpoint had taken."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training until now."""
        return self._before + time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: arguments of a clock that goes on."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the checkpoint's time; one of an older version has none."""
        self._start = time.perf_counter()
        states: Any = state.stateful_callbacks
        self._before = states.setdefault(type(self).__name__, self.state())["args"]["seconds"]


class ResumedCheckpoints(TrainerCallback):
    """Puts the checkpoints of a resumed run in order; `folder` is where they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the best one, if the folder was moved or copied; end a rotation in which the run was killed."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        # As the trainer spells the folder, which keeps the best one by its name.
        for folder in (args.output_dir or self.folder, self.folder):
            if state.best_global_step and os.path.isdir(os.path.join(folder, name)):
                state.best_model_checkpoint = os.path.join(folder, name)
                break
        if args.should_save and args.output_dir:
            rotate(Path(args.output_dir), args.save_total_limit, state.best_model_checkpoint)
        state.compute_steps(args, state.max_steps)  # of logs, evaluations and checkpoints: as asked for now


class ResumedRate(TrainerCallback):
    """Begins a resumed run with the learning rate of its own schedule: the trainer restores the earlier one's."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same number, if the schedule is the same; with more epochs another."""
        schedule = kwargs.get("lr_scheduler")
        schedule = getattr(schedule, "scheduler", schedule)  # inside accelerate's
        if not state.global_step or not isinstance(schedule, LambdaLR):
            return
        for group, rate, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


class CheckpointLast(TrainerCallback):
    """At the last step of an epoch or of the run: one checkpoint, after all else that happens at this step.

    The trainer would save after the step, evaluate at the end of the epoch and perhaps save again. Killed in
    between, a run could not make up for the evaluation, and the second checkpoint would be written into the first.
    """

    def __init__(self) -> None:
        self._is_wanted = False
        self._saved = -1  # step of the last checkpoint

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A signal in an evaluation after the step asks for it at once."""
        self._saved = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the checkpoint off."""
        self._is_wanted = control.should_save and (control.should_training_stop or is_whole_epoch(state.epoch))
        if self._is_wanted:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follows at once."""
        control.should_save = (control.should_save or self._is_wanted) and self._saved != state.global_step
        self._is_wanted = False


class AveragedWeights(TrainerCallback):
    """Before weights are saved or training ends: optimisers that train others than they give, as schedule-free ones do.

    The trainer asks them when it evaluates only; at the next step it tells them to go on.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for the weights that count."""
        if control.should_save or control.should_training_stop:
            ask_for_averages(kwargs.get("optimizer"))

    on_epoch_end = on_step_end


def ask_for_averages(optimizer: Any) -> None:
    """Have an optimiser that trains other weights than it gives put those into the model; others know of none."""
    ask = getattr(optimizer, "eval", None)
    if callable(ask):
        ask()


def is_whole_epoch(epoch: float | None) -> bool:
    """Whether an epoch is not being trained, but at its end."""
    return epoch is not None and abs(epoch - round(epoch)) <= _EPOCH_TOLERANCE


class FiniteLoss(TrainerCallback):
    """Stops a run whose loss is no number any more: every later step would only spread it."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint: look at the weights, since the loss may not have been logged yet.

        Raises:
            NotFiniteError: a trained weight is NaN or infinite.
        """
        if control.should_save:
            check_weights(args, state, kwargs["model"])

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last step, whose loss is from before it; raises as `on_step_end`."""
        check_weights(args, state, kwargs["model"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Look at the losses of a log entry.

        Raises:
            NotFiniteError: a loss is NaN or infinite.
        """
        for name in ("loss", "eval_loss", "train_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise _diverged(f"`{name}` is {value}", args, state)


def check_weights(args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
    """Look at the trained weights.

    Raises:
        NotFiniteError: one is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter):
                is_finite = bool(torch.isfinite(parameter).all())
            if not is_finite:
                raise _diverged(f"weight {name} is no longer finite", args, state)


@contextlib.contextmanager
def overflow_explained(trainer: Trainer) -> Iterator[None]:
    """Turn the error of an optimiser whose step has a factor that is no float32 into one that says what to do.

    Raises:
        NotFiniteError: there was such an error in the block; others pass.
    """
    try:
        yield
    except RuntimeError as error:
        # Trained weights are in float32; such an error about another format is the model's own.
        if "to type float without overflow" not in str(error):
            raise
        raise _diverged("the step of the optimiser overflows", trainer.args, trainer.state) from error


def _diverged(what: str, args: TrainingArguments, state: TrainerState) -> NotFiniteError:
    last = newest_complete(Path(args.output_dir or "."))
    start = f"start from the last checkpoint before with --adapter {shlex.quote(str(last))}" if last else "start again"
    return NotFiniteError(
        f"{what} at step {state.global_step}: training has diverged. Lower `learning_rate` ({args.learning_rate}), "
        f"raise `warmup_steps`, or train with --dtype float32, and {start} in another `output_dir`."
    )

"""Callbacks of a run: the loss curve, the time, what a resumed run needs, and the check that weights stay finite."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from mola.errors import NotFiniteError
from mola.files.atomic import append_lines, atomic_write_text
from mola.files.reading import select_lines
from mola.training.checkpoints import newest_complete
from mola.training.distributed import gathered

_EPOCH_TOLERANCE = 1e-6  # far below one step of the longest epoch, far above rounding


class MetricsFile(TrainerCallback):
    """Appends every log entry to a JSON lines file. A resumed run keeps the lines up to its step.

    Args:
        path: the file.
        checkpoint: the checkpoint that the run resumes from, which may be in a different folder; or None.
    """

    def __init__(self, path: Path, checkpoint: Path | None = None) -> None:
        self.path = path
        self._earlier_path = path if checkpoint is None else checkpoint.parent / path.name

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Drop lines that the resumed part of the run will write again."""
        if not state.is_world_process_zero:
            return
        has_ended = False

        def is_kept(entry: dict[str, Any]) -> bool:
            nonlocal has_ended
            has_ended = has_ended or "train_loss" in entry  # the summary; only an evaluation may follow it
            return not has_ended and entry["step"] <= state.global_step

        lines = select_lines(self._earlier_path, is_kept) if state.global_step else []
        atomic_write_text(self.path, "".join(line + "\n" for line in lines))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line. JSON has no NaN, so numbers that are not finite become null."""
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step, "epoch": state.epoch, **logs}
            entry = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in entry.items()
            }
            append_lines(self.path, [json.dumps(entry, allow_nan=False)])


class TrainingClock(TrainerCallback, ExportableState):
    """Wall time of training. A resumed run continues from the time in its checkpoint."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds_before = seconds
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training until now."""
        return self._seconds_before + time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: the arguments of a clock that continues from now."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock with the seconds in the checkpoint; checkpoints of older versions have none."""
        self._start = time.perf_counter()
        states: Any = state.stateful_callbacks
        self._seconds_before = states.setdefault(type(self).__name__, self.state())["args"]["seconds"]


class ResumedRun(TrainerCallback):
    """Makes the state of a resumed run fit its options and `folder`, which contains the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Correct what the Trainer has read from the checkpoint.

        - The best checkpoint is found again if its folder was moved or copied.
        - If a kill cut off the removal of old checkpoints, the removal is finished.
        - The intervals of logs, evaluations and checkpoints, and the learning rate, follow the resumed run's options.
        """
        output_dir = str(args.output_dir)
        for folder in (Path(output_dir), self.folder):
            best = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if state.best_global_step and best.is_dir():
                state.best_model_checkpoint = str(best)
                break
        if args.should_save:
            rotate_checkpoints(output_dir, args.save_total_limit, state.best_model_checkpoint)
        state.compute_steps(args, state.max_steps)
        schedule = kwargs.get("lr_scheduler")
        schedule = getattr(schedule, "scheduler", schedule)  # Accelerate wraps it
        if state.global_step and isinstance(schedule, LambdaLR):
            # Give the optimiser the rates of its own schedule; the Trainer has restored those of the earlier run.
            groups = schedule.optimizer.param_groups
            for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = rate * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in groups]


class CheckpointLast(TrainerCallback):
    """Writes one checkpoint at the last step of an epoch or of the run, after this step's evaluation.

    The Trainer would save after the step, evaluate at the end of the epoch, and perhaps save again. If the run were
    killed before the evaluation, the resumed run would not evaluate this epoch.
    """

    def __init__(self) -> None:
        self._is_postponed = False
        self._saved_step = -1

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remember the step; a signal during an evaluation saves before the epoch ends."""
        self._saved_step = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Postpone the checkpoint of the last step."""
        self._is_postponed = control.should_save and (control.should_training_stop or is_whole_epoch(state.epoch))
        if self._is_postponed:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request the postponed checkpoint. The Trainer evaluates before it saves."""
        control.should_save = (control.should_save or self._is_postponed) and self._saved_step != state.global_step
        self._is_postponed = False


class AveragedWeights(TrainerCallback):
    """Puts averaged weights into the model before weights are saved.

    Some optimisers (schedule-free ones) train one set of weights and evaluate averages of it. The Trainer switches to
    the averages only when it evaluates, and switches back at the next step.
    """

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Put the averages into the model before a checkpoint and before the end of training."""
        switch_to_averages = getattr(kwargs.get("optimizer"), "eval", None)  # most optimisers have none
        if switch_to_averages is not None and (control.should_save or control.should_training_stop):
            switch_to_averages()

    on_epoch_end = on_step_end


def is_whole_epoch(epoch: float | None) -> bool:
    """Whether a number of epochs is a whole number."""
    return epoch is not None and abs(epoch - round(epoch)) <= _EPOCH_TOLERANCE


class FrozenInput(TrainerCallback):
    """Lets activation checkpointing be compiled.

    With activation checkpointing Transformers makes the output of the embeddings require a gradient, by a change that
    no compiled graph can hold: layer after layer would run without the compiler. Only re-entrant checkpointing needs
    this gradient.
    """

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Undo the change, which the Trainer has made by now."""
        settings: Any = args.activation_checkpointing_kwargs or {}
        if args.torch_compile and args.activation_checkpointing and settings.get("use_reentrant") is False:
            kwargs["model"].disable_input_require_grads()


class FiniteLoss(TrainerCallback):
    """Stops a run when its loss or its weights are no longer finite, with a `NotFiniteError`."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the weights before a checkpoint, since the loss may not have been logged yet."""
        if control.should_save:
            _check_weights(args, state, kwargs["model"])

    on_epoch_end = on_step_end

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Check the weights after the last step."""
        _check_weights(args, state, kwargs["model"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Check the losses of a log entry."""
        for name in ("loss", "eval_loss", "train_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise _diverged(f"`{name}` is {value}", args, state)


def _check_weights(args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter):
                is_finite = bool(torch.isfinite(parameter).all())
            if not is_finite:
                raise _diverged(f"weight {name} is no longer finite", args, state)


@contextlib.contextmanager
def overflow_explained(trainer: Trainer) -> Iterator[None]:
    """Turn the error of an optimiser whose step overflows in float32 into an error that says what to do.

    Raises:
        NotFiniteError: the optimiser's step overflowed in this block; other errors are not changed.
    """
    try:
        yield
    except RuntimeError as error:
        # Trainable weights are in float32; the same error about a different format comes from the model.
        if "to type float without overflow" not in str(error):
            raise
        raise _diverged("the step of the optimiser overflows", trainer.args, trainer.state) from error


def _diverged(what: str, args: TrainingArguments, state: TrainerState) -> NotFiniteError:
    last = newest_complete(Path(str(args.output_dir)))
    start = f"start from the last checkpoint before with --adapter {shlex.quote(str(last))}" if last else "start again"
    return NotFiniteError(
        f"{what} at step {state.global_step}: training has diverged. Lower `learning_rate` ({args.learning_rate}), "
        f"raise `warmup_steps`, or train with --dtype float32, and {start} in another `output_dir`."
    )

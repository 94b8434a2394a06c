"""SIGINT and SIGTERM end a run cleanly, with a checkpoint and the record of an interrupted run."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mola.training.callbacks import is_whole_epoch

logger = logging.getLogger(__name__)


class _LeftError(Exception):
    """Raised to leave the evaluation after training."""


class Interruption(TrainerCallback):
    """On SIGINT or SIGTERM: finish the step or the evaluation, save a checkpoint, stop. A second signal stops at once.

    It handles signals from the beginning of training until `restore`.

    Attributes:
        received_here: the first signal that came to this process, or None. Other processes may not know it yet.
        shared_signal: the signal that stops the run, the same in all processes, or None.
    """

    def __init__(self) -> None:
        self.shared_signal: int | None = None
        self.received_here: int | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._is_trained = False
        self._first_step = 0
        self._cpu_group: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin to handle signals, if this is the main thread: Python allows no other to."""
        self._first_step = state.global_step
        self.restore()  # with `auto_find_batch_size` training may begin several times
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # a shell ignores SIGINT for background jobs
                    self._previous_handlers[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received_here is not None:
            self.restore()
            os.kill(os.getpid(), number)
            return
        self.received_here = number
        plan = "saving a checkpoint after this step or evaluation, then stopping"
        if self._is_trained:
            plan = "leaving the evaluation"
        logger.warning("%s: %s. A second signal stops at once, without saving.", signal.Signals(number).name, plan)

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def share_signal(self, args: TrainingArguments) -> None:
        """Set `shared_signal` in all processes to a signal that any of them has received.

        All processes must stop at the same step, or those that train on would wait forever.
        """
        if args.world_size == 1:
            self.shared_signal = self.received_here
            return
        if self._cpu_group is None:  # NCCL would wait in every step until the GPU has finished
            self._cpu_group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
        number = torch.tensor(self.received_here or 0)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX, group=self._cpu_group)
        self.shared_signal = int(number) or None

    # ------------------------------------------------------------------ during training

    def on_step_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint and the end of training if a signal came."""
        self._stop_if_signalled(args, control, saves=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """If a signal came during an evaluation, keep its result and stop before the next step.

        Before the first step nothing is saved: an uninterrupted run has no checkpoint of step 0 either.
        """
        if not self._is_trained and state.global_step > self._first_step:
            self._stop_if_signalled(args, control, saves=True)

    def on_save(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if a signal came while a checkpoint was saved."""
        self._stop_if_signalled(args, control, saves=False)

    def _stop_if_signalled(self, args: TrainingArguments, control: TrainerControl, *, saves: bool) -> None:
        self.share_signal(args)
        if self.shared_signal is None:
            return
        control.should_training_stop = True
        if args.save_total_limit == 1:
            args.save_total_limit = 2  # with 1 the Trainer would keep only the best checkpoint, not the last one
        if saves:
            control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:
                args.save_strategy = SaveStrategy.EPOCH  # with "best" an evaluation would decide whether to save

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a signal, skip the evaluation unless the epoch or the run is complete.

        A resumed run evaluates an incomplete epoch itself, but never repeats a complete one.
        """
        is_cut_short = not is_whole_epoch(state.epoch) and state.global_step < state.max_steps
        if self.shared_signal is not None and is_cut_short:
            control.should_evaluate = False

    # ------------------------------------------------------------------ the evaluation after training

    @contextlib.contextmanager
    def stop_on_signal(self) -> Iterator[None]:
        """A block with the evaluation after training: in a single process a signal ends it at the next batch.

        Several processes finish the evaluation, since the others would wait for a process that left it.
        """
        self._is_trained = True
        with contextlib.suppress(_LeftError):
            yield

    def on_prediction_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation after training if a signal came and this is the only process."""
        if self._is_trained and self.received_here is not None and args.world_size == 1:
            raise _LeftError

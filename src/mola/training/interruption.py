"""SIGINT and SIGTERM end a run in order: with a checkpoint, and the record of an interrupted run."""

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
        received: the first signal that came to this process, or None. Other processes may not know of it yet.
        signal_number: the signal that stops the run, the same in all processes, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.received: int | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._is_trained = False
        self._first_step = 0
        self._cpu_group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to handle signals. Only the main thread of a program may."""
        self._first_step = state.global_step
        self.restore()  # with `auto_find_batch_size` training may begin several times
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # a shell ignores SIGINT for background jobs
                    self._previous_handlers[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            self.restore()
            os.kill(os.getpid(), number)
            return
        self.received = number
        plan = "saving a checkpoint after this step or evaluation, then stopping"
        if self._is_trained:
            plan = "leaving the evaluation"
        logger.warning("%s: %s. Once more stops at once, without saving.", signal.Signals(number).name, plan)

    def restore(self) -> None:
        """Give the signals back to their earlier handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def share(self, args: TrainingArguments) -> None:
        """Set `signal_number` in all processes to a signal that any of them has received.

        All processes have to stop at the same step, or the others would wait for ever.
        """
        if args.world_size == 1:
            self.signal_number = self.received
            return
        if self._cpu_group is None:  # on GPUs this would wait in every step for what is still being computed
            self._cpu_group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
        number = torch.tensor(self.received or 0)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX, group=self._cpu_group)
        self.signal_number = int(number) or None

    # ------------------------------------------------------------------ during training

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end if a signal came."""
        self._stop_if_signalled(args, control, saves=True)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Keep the evaluation in which a signal came, and do no further step.

        Before the first step nothing is saved: an uninterrupted run has no checkpoint there.
        """
        if not self._is_trained and state.global_step > self._first_step:
            self._stop_if_signalled(args, control, saves=True)
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop if a signal came while a checkpoint was saved."""
        self._stop_if_signalled(args, control, saves=False)
        return control

    def _stop_if_signalled(self, args: TrainingArguments, control: TrainerControl, *, saves: bool) -> None:
        self.share(args)
        if self.signal_number is None:
            return
        control.should_training_stop = True
        if args.save_total_limit == 1:
            args.save_total_limit = 2  # with 1 the Trainer would keep the best checkpoint and remove the last one
        if saves:
            control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:
                args.save_strategy = SaveStrategy.EPOCH  # with "best" an evaluation would decide whether to save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate only an epoch, or a run, that was complete when the signal came: a resumed run will not do it."""
        is_cut_short = not is_whole_epoch(state.epoch) and state.global_step < state.max_steps
        if self.signal_number is not None and is_cut_short:
            control.should_evaluate = False
        return control

    # ------------------------------------------------------------------ the evaluation after training

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """A block with the evaluation after training, which is left at the next batch when a signal comes.

        Several processes finish the evaluation, or the others would wait for the one that left.
        """
        self._is_trained = True
        with contextlib.suppress(_LeftError):
            yield

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the evaluation after training if a signal came."""
        if self._is_trained and self.received is not None and args.world_size == 1:
            raise _LeftError

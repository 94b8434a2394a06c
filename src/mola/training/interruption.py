"""A signal ends a run in order: with a checkpoint, and the record of an interrupted run."""

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
    """Raised out of the last evaluation."""


class Interruption(TrainerCallback):
    """On SIGINT or SIGTERM: finish the step or the evaluation, save a checkpoint, stop. A second signal stops at once.

    From the beginning of training on; `restore` gives the signals back.

    Attributes:
        signal_number: the signal that stops the run, in all processes, or None.
        received: the first one that came to this process, which the others do not know of yet; or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._is_trained = False
        self._first_step = 0
        self._on_host: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the signals; only the main thread of a program may."""
        self._first_step = state.global_step
        self.restore()  # a training that begins again, with smaller batches, has taken them over before
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell does for jobs in the background
                    self._previous[number] = signal.signal(number, self._handle)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """For the evaluation after training, which a signal ends at its next batch; the block is left then.

        With several processes it is done to its end: the others would wait for the one that left.
        """
        self._is_trained = True
        with contextlib.suppress(_LeftError):
            yield

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last evaluation, if a signal came."""
        if self._is_trained and self.received is not None and args.world_size == 1:
            raise _LeftError

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end, if a signal came."""
        self._look(args, control, saves=True)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A signal that came during an evaluation: what it measured is kept, no step follows.

        Not one before the first step: a checkpoint of it would not be what an untouched run has.
        """
        if not self._is_trained and state.global_step > self._first_step:
            self._look(args, control, saves=True)
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A signal that came while the trainer saved."""
        self._look(args, control, saves=False)
        return control

    def _look(self, args: TrainingArguments, control: TrainerControl, *, saves: bool) -> None:
        self.share(args)
        if self.signal_number is None:
            return
        control.should_training_stop = True
        self._keep_last_checkpoint(args)
        if saves:
            control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:
                args.save_strategy = SaveStrategy.EPOCH  # an evaluation would take back the wish to save

    def _keep_last_checkpoint(self, args: TrainingArguments) -> None:
        """With a limit of one the trainer ends with the best checkpoint alone, and the run could not go on here."""
        if self.signal_number is not None and args.save_total_limit == 1:
            args.save_total_limit = 2

    def share(self, args: TrainingArguments) -> None:
        """All processes stop at the same place, or those left would wait for the others for ever."""
        if args.world_size == 1:
            self.signal_number = self.received
            return
        if self._on_host is None:  # a group of its own: on GPUs every step would wait for what they still compute
            self._on_host = distributed.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
        number = torch.tensor(self.received or 0)  # one that comes while it waits for the others is for the next time
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX, group=self._on_host)
        self.signal_number = int(number) or None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The trainer also ends an epoch that a signal cut short: no evaluation of it.

        An epoch, or a run, that was complete when the signal came is evaluated, since the resumed run will not do it.
        """
        is_cut_short = not is_whole_epoch(state.epoch) and state.global_step < state.max_steps
        if self.signal_number is not None and is_cut_short:
            control.should_evaluate = False
        return control

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            self.restore()
            os.kill(os.getpid(), number)
            return
        self.received = number
        before = "saving a checkpoint after this step or evaluation, then stopping"
        what = "leaving the evaluation" if self._is_trained else before
        logger.warning("%s: %s. Once more stops at once, without saving.", signal.Signals(number).name, what)

"""The processes of a run meet before their group is set up: one that waits for others says so, and not without end."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from mola.errors import MolaError
from mola.files.failures import lost_process
from mola.training.zero import uses_deepspeed

logger = logging.getLogger(__name__)

_LONGEST = 600.0  # seconds: all processes of a run are started at once
_UNSAID = 10.0  # seconds that may pass without a word
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what launchers set


@contextlib.contextmanager
def lost_process_explained() -> Iterator[None]:
    """Turn an error of the block about another process into a `MolaError` that says how to go on; others pass."""
    try:
        yield
    except Exception as error:
        reason = lost_process(error)
        if reason is None:
            raise
        raise MolaError(
            f"another process of this run has ended, or does not answer: {reason}. Its own output, or the system's "
            "log, may say why. Start all of them again with the same command: go on from the last complete "
            "checkpoint with --resume_from_checkpoint last, or without one begin anew with --overwrite_output_dir."
        ) from error


@contextlib.contextmanager
def meeting(options: TrainingArguments) -> Iterator[None]:
    """In this block, where the process group is set up, all processes of the run have come.

    The group itself would wait for `ddp_timeout`, half an hour by default, for one that was killed while it started.

    Raises:
        MolaError: one of them did not come in time, or has ended.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) < 2 or not all(map(os.environ.get, _NAMES))
    if is_alone or not torch.distributed.is_available() or torch.distributed.is_initialized():
        yield
        return
    if uses_deepspeed(options):
        importlib.import_module("deepspeed")  # takes seconds: not between the meeting and the group
    seconds = min(options.ddp_timeout, _LONGEST)
    says = "Process %s waits for the others, %s in all: for about %g s (--ddp_timeout, or less)."
    numbers = (os.environ["RANK"], os.environ["WORLD_SIZE"], seconds)
    notice = threading.Timer(min(_UNSAID, seconds / 2), logger.warning, [says, *numbers])
    notice.daemon = True
    notice.start()
    try:
        with lost_process_explained():
            store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=seconds)))
            store.set(f"mola/{rank}", "is here")
            store.wait([f"mola/{each}" for each in range(size)], timedelta(seconds=seconds))
            if options.use_cpu:  # where Transformers leaves `ddp_timeout` out; it finds the group that is set up here
                PartialState(cpu=True, backend=options.ddp_backend, timeout=options.ddp_timeout_delta)
            yield
    finally:
        notice.cancel()

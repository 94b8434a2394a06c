"""Several processes of one run: who goes first, who waits, who speaks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments


@contextmanager
def main_process_first(options: TrainingArguments) -> Iterator[None]:
    """The main process does it alone, then the others do; they may, also if the first one fails."""
    is_main = options.process_index == 0
    if not is_main:
        wait_for_all(options)
    try:
        yield
    finally:
        if is_main:
            wait_for_all(options)


def wait_for_all(options: TrainingArguments) -> None:
    """Go on when every process of the run has come here."""
    if options.world_size > 1 and options.distributed_state is not None:
        options.distributed_state.wait_for_everyone()


def let_main_process_speak(options: TrainingArguments) -> None:
    """Messages that are the same in every process are shown once; errors of every process are shown."""
    if options.process_index != 0:
        logging.getLogger("mola").setLevel(logging.ERROR)

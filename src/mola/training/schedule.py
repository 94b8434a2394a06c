"""How many steps a run has, of how many samples, and whether its learning rate's schedule can be made for them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from mola.errors import MolaError
from mola.files.reading import read_json_object
from mola.training.checkpoints import STATE_FILE
from mola.training.data import TrainingData
from mola.training.options import TrainOptions

logger = logging.getLogger(__name__)


def check_steps(options: TrainOptions, data: TrainingData) -> int:
    """Number of optimiser steps of the run.

    Raises:
        MolaError: the learning rate would still be warming up when the run ends, its schedule cannot be made, no
            batch is full where only full ones count, or there are no data for an evaluation that was asked for.
    """
    num_samples = len(data.train)
    _check_full_batch(options, "train", num_samples, options.train_batch_size)
    if data.evaluation is None and options.eval_on_start:
        raise MolaError(
            "`eval_on_start` needs evaluation data: there are none, or `eval_strategy` is no. Leave it out."
        )
    if data.evaluation is not None:
        _check_full_batch(options, "eval", len(data.evaluation), options.eval_batch_size)
    whole = math.floor if options.dataloader_drop_last else math.ceil
    batches = whole(num_samples / (options.train_batch_size * options.world_size))
    per_epoch = math.ceil(batches / options.gradient_accumulation_steps)
    steps = options.max_steps if options.max_steps > 0 else math.ceil(options.num_train_epochs * per_epoch)
    warmup = options.get_warmup_steps(steps)
    if warmup >= steps:
        raise MolaError(
            f"`warmup_steps` must end before the run does: {warmup} steps of warm-up in a run of {steps} "
            f"({num_samples} samples, effective batch {effective_batch_size(options)}). Lower `warmup_steps` (below 1 "
            "it is a share of the run), train longer, or use smaller batches."
        )
    _check_scheduler(options, warmup, steps, has_evaluation=data.evaluation is not None)
    return steps


def _check_scheduler(options: TrainOptions, warmup: int, steps: int, *, has_evaluation: bool) -> None:
    """Whether the learning rate's schedule can be made, and is ever asked.

    Raises:
        MolaError: settings that it lacks or does not know, or it goes by evaluations and there are none.
    """
    name = SchedulerType(options.lr_scheduler_type).value
    if name in ("reduce_lr_on_plateau", "greedy") and not has_evaluation:
        raise MolaError(
            f"`lr_scheduler_type` {name} goes by the evaluation loss, and there is no evaluation data. Pass "
            "--eval_data, or another schedule."
        )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
    kwargs: Any = options.lr_scheduler_kwargs
    try:
        get_scheduler(
            options.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        raise MolaError(
            f"`lr_scheduler_type` {name} cannot be made with `lr_scheduler_kwargs` {kwargs!r}: {error}. See "
            "`transformers.optimization` for what it takes, as a mapping."
        ) from error


def goes_on_with_found_batch(options: TrainOptions, checkpoint: Path) -> None:
    """Take over the batch that `auto_find_batch_size` had found when a checkpoint was written, as the trainer does."""
    found = read_json_object(checkpoint / STATE_FILE).get("train_batch_size")
    if isinstance(found, int) and found > 0 and found != options.per_device_train_batch_size:
        logger.info("The run goes on with batches of %d samples, which had fitted.", found)
        options.per_device_train_batch_size = found


def _check_full_batch(options: TrainOptions, part: str, num_samples: int, batch_size: int) -> None:
    """Refuse `dataloader_drop_last` where it would leave nothing of `part`, train or eval."""
    needed = batch_size * options.world_size
    if options.dataloader_drop_last and num_samples < needed:
        raise MolaError(
            f"`dataloader_drop_last` leaves nothing of the {num_samples} samples of the {part} data: a batch has "
            f"{needed}. Lower `per_device_{part}_batch_size`, or leave it out."
        )


def effective_batch_size(options: TrainOptions) -> int:
    """Samples per optimiser step over all processes."""
    return options.train_batch_size * options.gradient_accumulation_steps * options.world_size

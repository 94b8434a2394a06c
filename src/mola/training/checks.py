"""Everything that is checked and settled before the weights of a run are loaded."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments, get_scheduler

from mola.checkpoints.recorded_base import base_model_of
from mola.errors import MolaError
from mola.files.reading import read_json_object
from mola.models.adapters import check_adapter, warn_other_base
from mola.training.checkpoints import (
    STATE_FILE,
    check_best_checkpoint,
    check_same_run,
    evaluates_alike,
    find_checkpoint,
)
from mola.training.data import TrainingData, prepare_data
from mola.training.distributed import check_distributed
from mola.training.fields import LOGGING_STEPS
from mola.training.model import base_config, check_model_options, load_tokenizer_for, stores_packed
from mola.training.option_checks import EVALUATION_SCHEDULES, name_of
from mola.training.options import TrainOptions
from mola.training.run_record import describe_run
from mola.training.skill import check_into
from mola.tuner.kernels.dispatch import forced_backend

logger = logging.getLogger(__name__)


@dataclass
class CheckedRun:
    """A run whose options and data have been checked.

    Attributes:
        folder: the run folder.
        config: configuration of the base model.
        adapter: configuration of the adapter.
        checkpoint: the checkpoint that the run resumes from, or None.
        steps: number of optimiser steps, including those before a resume.
        steps_before_resume: number of steps that the checkpoint has done.
        evaluates_as_before: whether the run of the checkpoint measured the evaluation loss in the same way.
        tokenizer: of the base model.
        data: encoded samples.
        record: what `run.json` will hold.
    """

    folder: Path
    config: PretrainedConfig
    adapter: PeftConfig
    checkpoint: Path | None
    steps: int
    steps_before_resume: int
    evaluates_as_before: bool
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    record: dict[str, Any]


def check_run(options: TrainOptions, folder: Path) -> CheckedRun:
    """Check a run, and change the options that depend on its data; loads no weights.

    Raises:
        MolaError: options, base model, data and checkpoint do not fit each other.
    """
    checkpoint = find_checkpoint(folder, options.resume_from_checkpoint)
    forced_backend()  # raises for an unknown name in MOLA_KERNEL
    if checkpoint is not None:
        options.base_model = base_model_of(options.base_model, [checkpoint])
    config = base_config(options)
    if options.skill is not None:
        check_into(options)
    adapter, allocation = check_model_options(options, config, checkpoint)
    has_stacked_experts = bool(getattr(adapter, "target_parameters", None))
    check_distributed(options, checkpoint, stores_packed(options, config), has_stacked_experts)
    if start := checkpoint or options.adapter:
        warn_other_base(options.base_model or "", start, check_adapter(start))
    tokenizer = load_tokenizer_for(options, config)
    data = prepare_data(options, tokenizer, config, checkpoint)

    state = read_json_object(checkpoint / STATE_FILE) if checkpoint is not None else {}
    if options.auto_find_batch_size and state.get("train_batch_size"):  # what the Trainer had found
        options.per_device_train_batch_size = state["train_batch_size"]
    steps = check_steps(options, data)
    if options.num_gpus > 1:
        logger.warning(
            "One of %d GPUs is used. To use all of them, start one process per GPU with torchrun or accelerate launch.",
            options.num_gpus,
        )
    _settle_steps(options, data, steps)
    record = describe_run(options, config, data, allocation)
    steps_before_resume = state.get("global_step", 0)
    evaluates_as_before = checkpoint is not None and evaluates_alike(checkpoint, record)
    if checkpoint is not None:
        check_same_run(checkpoint, record)
        if options.load_best_model_at_end:
            check_best_checkpoint(checkpoint)
        options.eval_on_start = False  # the run was evaluated when it began
        if steps_before_resume >= steps:
            # Without this the Trainer would do one more step in an incomplete epoch.
            options.num_train_epochs, options.max_steps = 0, -1
            options.warmup_steps = 1  # without steps the polynomial schedule would divide by 0
    done = steps_before_resume, evaluates_as_before
    return CheckedRun(folder, config, adapter, checkpoint, steps, *done, tokenizer, data, record)


def _settle_steps(options: TrainOptions, data: TrainingData, steps: int) -> None:
    if options.logs_by_length:
        options.logging_steps = max(1, min(LOGGING_STEPS, steps // 20))  # a short run has a loss curve, too
    if options.optim.startswith("schedule_free"):  # these optimisers count the steps of the warm-up themselves
        options.warmup_steps = options.get_warmup_steps(steps)
    if data.evaluation is None:
        options.eval_strategy, options.load_best_model_at_end = "no", False
        if getattr(options, "saves_as_evaluated", False):
            options.save_steps = TrainingArguments.save_steps
        if options.save_strategy == "best":
            options.save_strategy = "epoch"


def check_steps(options: TrainOptions, data: TrainingData) -> int:
    """The number of optimiser steps of a run. A warm-up as long as the run, or longer, is shortened to a tenth of it.

    Raises:
        MolaError: the run has no step; the optimiser or the schedule of the learning rate cannot be made.
    """
    whole = math.floor if options.dataloader_drop_last else math.ceil
    batches = whole(len(data.train) / (options.train_batch_size * options.world_size))
    per_epoch = math.ceil(batches / options.gradient_accumulation_steps)
    steps = options.max_steps if options.max_steps > 0 else math.ceil(options.num_train_epochs * per_epoch)
    if batches == 0:
        raise MolaError(
            f"`dataloader_drop_last` drops all {len(data.train)} samples: they fill no batch. Leave it out."
        )
    warmup = options.get_warmup_steps(steps)
    if warmup >= steps:
        options.warmup_steps = min(math.ceil(0.1 * steps), steps - 1)
        logger.warning("Warm-up of %d steps in a run of %d: shortened to %d.", warmup, steps, options.warmup_steps)
        warmup = int(options.warmup_steps)
    schedule, optimizer_name = name_of(options.lr_scheduler_type), name_of(options.optim)
    if schedule in EVALUATION_SCHEDULES and data.evaluation is None:
        raise MolaError(
            f"`lr_scheduler_type` {schedule} follows the evaluation loss, and there is no evaluation data. Pass "
            "--eval_data, or another schedule."
        )
    # Make the schedule once without using it, so that wrong settings fail before the base model is loaded.
    with library_errors(f"`lr_scheduler_type` {schedule}"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
        kwargs: Any = options.lr_scheduler_kwargs
        get_scheduler(options.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)
    if "lomo" not in optimizer_name:  # these optimisers can only be made with a model
        with library_errors(f"`optim` {optimizer_name}"):
            Trainer.get_optimizer_cls_and_kwargs(options)
    return steps


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn the error of a library that cannot make `what` with the given options into a `MolaError`."""
    try:
        yield
    except MolaError:
        raise
    except (ImportError, TypeError, ValueError) as error:
        raise MolaError(f"{what} cannot be made with these options: {error}") from error

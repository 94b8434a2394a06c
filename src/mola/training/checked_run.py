"""What is settled, and everything that can be wrong, before the weights of a run are loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from mola.errors import MolaError
from mola.models.adapters import check_adapter, warn_other_base
from mola.training.checkpoints import (
    asks_for_last,
    check_best_checkpoint,
    checkpoint_step,
    find_checkpoint,
    newest_complete,
)
from mola.training.data import TrainingData, prepare_data
from mola.training.hub import check_hub_options
from mola.training.options import TrainOptions
from mola.training.run_folder import check_output_dir, check_start_is_kept
from mola.training.run_record import describe_run
from mola.training.same_run import check_nothing_is_left, check_same_run
from mola.training.schedule import check_steps, effective_batch_size, goes_on_with_found_batch
from mola.training.setup import check_model_options, load_tokenizer_for, stores_packed
from mola.training.sharding import check_sharding, is_sharded
from mola.training.zero import check_deepspeed, uses_deepspeed
from mola.tuner.kernels.dispatch import forced_backend

logger = logging.getLogger(__name__)


@dataclass
class CheckedRun:
    """Of one run: its folder, where it goes on, its data and the record to be written."""

    folder: Path
    checkpoint: Path | None
    first_step: int
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    record: dict[str, Any]


def check_folder_again(options: TrainOptions, run: CheckedRun) -> None:
    """Refuse a folder in which another run has ended since it was looked at; for who has it alone now.

    Raises:
        MolaError: there is a checkpoint or a result that was not there.
    """
    _check_folder(options)
    if asks_for_last(options.resume_from_checkpoint) and newest_complete(run.folder) != run.checkpoint:
        raise MolaError(
            f"`resume_from_checkpoint`: another run in {str(run.folder)!r} has ended while this one was looking at its "
            "data, and saved a later checkpoint. Start it again to go on from there."
        )


def _check_folder(options: TrainOptions) -> Path:
    return check_output_dir(
        options.output_dir, overwrite=options.overwrite_output_dir, resume=options.resume_from_checkpoint
    )


def check_run(options: TrainOptions) -> CheckedRun:
    """Everything that can be wrong before weights are loaded; settles what options leave open."""
    check_hub_options(options)
    if options.adapter is not None:
        check_start_is_kept(options.adapter, options.output_dir)
    # It tries to write, which others would take for an earlier run's file.
    with options.main_process_first(local=False):
        folder = _check_folder(options)
    checkpoint = find_checkpoint(folder, options.resume_from_checkpoint)
    check_sharding(options, checkpoint, is_quantized=is_sharded(options) and stores_packed(options))
    if uses_deepspeed(options):
        check_deepspeed(options, is_quantized=stores_packed(options))
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    forced_backend()  # raises for a name that there is not
    allocation = check_model_options(options, checkpoint)
    if options.adapter is not None and checkpoint is None:
        warn_other_base(options.base_model or "", options.adapter, check_adapter(options.adapter))
    tokenizer = load_tokenizer_for(options)
    data = prepare_data(options, tokenizer, checkpoint)
    if checkpoint is not None and options.auto_find_batch_size:
        goes_on_with_found_batch(options, checkpoint)
    steps = check_steps(options, data)
    if options.optim.startswith("schedule_free"):
        options.warmup_steps = options.get_warmup_steps(steps)  # the optimiser counts them, and knows no shares
    if options.num_gpus > 1:
        logger.warning(
            "One of %d GPUs is used. To use all start one process for each: with torchrun, in studies the same command "
            "again with another CUDA_VISIBLE_DEVICES.",
            options.num_gpus,
        )
    logger.info("%d steps of %d samples; base model in %s.", steps, effective_batch_size(options), options.dtype_reason)
    if data.evaluation is None:
        options.eval_strategy, options.load_best_model_at_end = "no", False
        if getattr(options, "saves_as_evaluated", False):
            options.save_steps = TrainingArguments.save_steps
        if options.save_strategy == "best":
            options.save_strategy = "epoch"  # no evaluation says which one is the best
    record = describe_run(options, data, allocation)
    if checkpoint is not None:
        check_same_run(checkpoint, record)
        options.eval_on_start = False  # it was evaluated when it began
        warn_other_base(options.base_model or "", checkpoint, check_adapter(checkpoint))
        if options.load_best_model_at_end:
            check_best_checkpoint(checkpoint)
        if first_step >= steps:
            is_counted = options.max_steps < 1 and not options.ignore_data_skip
            check_nothing_is_left(checkpoint, options.num_train_epochs if is_counted else 0)
            # Nothing is left, but in an epoch that was begun the trainer would do one more step.
            options.num_train_epochs, options.max_steps = 0, -1
            options.warmup_steps = 1  # of no steps the polynomial schedule divides by those after the warm-up
    return CheckedRun(folder, checkpoint, first_step, tokenizer, data, record)

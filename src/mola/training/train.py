"""`mola train`: fine-tune a mixture of LoRA experts with the trainer of Transformers.

- Options, data and allocation are checked before weights are loaded.
- The run folder holds the adapter, the loss curve and everything needed to repeat or resume the run.
- SIGINT and SIGTERM save a checkpoint and stop; `--resume_from_checkpoint last` goes on from there.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, enable_full_determinism

from mola.errors import MolaError, NotFiniteError
from mola.files.failures import within_memory
from mola.insight import ROUTING_FILE
from mola.insight.kernels import kernels_report
from mola.insight.telemetry import ExpertTelemetry, drop_later_lines
from mola.reporting.model_card import CARD_FILE, PLOT_FILE, write_card
from mola.training.advice import failures_explained, loading_advice, loss_gap_advice
from mola.training.callbacks import TrainingClock, overflow_explained
from mola.training.checked_run import CheckedRun, check_folder_again, check_run
from mola.training.checkpoints import RUN_FILE, newest_complete
from mola.training.compiling import compiled_if_asked
from mola.training.hub import create_repository, upload
from mola.training.interruption import Interruption
from mola.training.options import TrainOptions
from mola.training.run_folder import METRICS_FILE, claimed, save_result, start_run
from mola.training.run_record import write_record
from mola.training.setup import build_model
from mola.training.sharding import is_sharded
from mola.training.trainer import MolaTrainer, make_trainer
from mola.training.zero import uses_deepspeed, whole_weights

__all__ = ["TrainOptions", "TrainResult", "main", "train"]

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a run ended with.

    Attributes:
        output_dir: the run folder; it holds the adapter.
        status: "finished", or "interrupted" by a signal.
        steps: optimiser steps done, those before a resume included.
        metrics: the trainer's final metrics; with evaluation data `eval_loss` of the saved weights.
        trainable_parameters: number of trained values, routers included.
        best_checkpoint: the checkpoint whose weights were saved, or None for the last weights.
        seconds: wall time of training, that before a resume included, without loading.
        warning: one line if the evaluation loss is far above the training loss, else None.
    """

    output_dir: str
    status: str
    steps: int
    metrics: dict[str, Any]
    trainable_parameters: int
    best_checkpoint: str | None
    seconds: float
    warning: str | None = None


def train(options: TrainOptions, callbacks: Sequence[TrainerCallback] = ()) -> TrainResult:
    """Run a fine-tuning.

    Args:
        options: see `TrainOptions`.
        callbacks: more callbacks of Transformers' trainer, called after mola's own.

    Returns:
        The result; the adapter is in `options.output_dir`.

    Raises:
        MolaError: options or data are wrong (before weights are loaded), or the memory or the disk did not suffice.
        NotFiniteError: loss, weights or routers are not finite; it is a MolaError.
    """
    options = copy.copy(options)  # what is settled below must not change the caller's object
    has_own_state = getattr(options.accelerator_config, "use_configured_state", False)
    if not (has_own_state or is_sharded(options) or uses_deepspeed(options)):
        AcceleratorState._reset_state()  # the mixed precision of a training before, after which these options were made
    with failures_explained(options):
        return _train(options, callbacks)


def _train(options: TrainOptions, callbacks: Sequence[TrainerCallback]) -> TrainResult:
    with whole_weights():
        run = check_run(options)
    with claimed(run.folder) if options.process_index == 0 else contextlib.nullcontext():
        if options.process_index == 0:
            check_folder_again(options, run)
        return _train_in(options, callbacks, run)


def _train_in(options: TrainOptions, callbacks: Sequence[TrainerCallback], run: CheckedRun) -> TrainResult:
    """The run in its folder."""
    pushes, options.push_to_hub = options.push_to_hub, False  # not by the trainer, see `mola.training.hub`
    if pushes and options.process_index == 0:
        run.record["repository"] = create_repository(options)
    if options.full_determinism:  # cuBLAS reads what this sets when it is used first
        enable_full_determinism(options.seed)
    with whole_weights(), within_memory(loading_advice(options)):
        model = build_model(options, run.checkpoint)
    if options.process_index == 0 and not is_sharded(options):  # whose weights are not yet where they are computed
        mixed = options.mixed_dtype
        with torch.autocast(options.device.type, mixed, enabled=mixed is not None):  # as in the run
            for choice in kernels_report(model, modes=["training"]):
                logger.info("Kernels, %s", choice)
    interruption = Interruption()
    trainer = make_trainer(options, model, run, interruption)
    for callback in callbacks:
        trainer.add_callback(callback)
    # Not before: as long as anything can be wrong, in any process, the earlier run stays.
    PartialState().wait_for_everyone()
    if options.process_index == 0:
        start_run(run.folder, run.checkpoint, overwrite=options.overwrite_output_dir)
    run.record["num_experts"] = getattr(model.active_peft_config, "num_experts", 1)  # LoRA has no such field
    run.record["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
    write_record(trainer, run.folder, {**run.record, "status": "running"})
    metrics, seconds = _trained(options, trainer, run, interruption)
    if options.auto_find_batch_size:  # which may have found a smaller one
        run.record["effective_batch_size"] = (
            trainer._train_batch_size * options.gradient_accumulation_steps * options.world_size
        )
    result = TrainResult(
        output_dir=str(run.folder),
        status="finished" if interruption.signal_number is None else "interrupted",
        steps=trainer.state.global_step,
        metrics=metrics,
        trainable_parameters=run.record["trainable_parameters"],
        best_checkpoint=trainer.state.best_model_checkpoint if options.load_best_model_at_end else None,
        seconds=seconds,
        warning=loss_gap_advice(options, trainer.state, metrics),
    )
    if result.warning is not None:
        logger.warning(result.warning)
    if options.load_best_model_at_end and result.status == "finished" and result.best_checkpoint is None:
        logger.warning("No evaluation chose a best checkpoint: the run ends with its last weights.")
    _save(options, trainer, run, result)
    return result


def _trained(
    options: TrainOptions, trainer: MolaTrainer, run: CheckedRun, interruption: Interruption
) -> tuple[dict[str, Any], float]:
    """Trains and evaluates: metrics, and seconds of training."""
    telemetry = ExpertTelemetry(run.folder / ROUTING_FILE, run.checkpoint)
    if options.expert_telemetry:
        telemetry.add_to(trainer)
    elif trainer.is_world_process_zero():
        drop_later_lines(run.folder / ROUTING_FILE, run.first_step)
    trainer.add_callback(TrainingClock())
    trainer.first_step = run.first_step
    try:
        with failures_explained(options), overflow_explained(trainer), compiled_if_asked(trainer):
            metrics = trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None).metrics
        interruption.share(options)  # a signal after the last step, to one of the processes
        seconds = _seconds(trainer)
        if trainer.state.global_step == run.first_step:
            metrics.pop("train_loss", None)  # nothing was left to train: its 0 is no loss
        if run.data.evaluation is not None and interruption.signal_number is None:
            with interruption.leaving():
                metrics.update(trainer.evaluate())
            interruption.share(options)  # one that came too late to end it
        if interruption.signal_number is not None and trainer.state.global_step > run.first_step:
            trainer.save_last_step()
    except BaseException as error:
        reason = str(error) or type(error).__name__
        failed = {**run.record, "status": "failed", "error": reason, "steps": trainer.state.global_step}
        if isinstance(error, NotFiniteError):
            error.was_interrupted = interruption.received is not None
        failed |= {"max_steps": trainer.state.max_steps, "seconds": _seconds(trainer)}
        with contextlib.suppress(MolaError):  # where the disk is full this cannot be written either
            write_record(trainer, run.folder, failed)
        raise
    finally:
        interruption.restore()
        telemetry.close()
    return metrics, seconds


def _seconds(trainer: Trainer) -> float:
    """Of training until now; `restore_callback_states_from_checkpoint` puts another clock in the place of the first."""
    return next(each.seconds for each in trainer.callback_handler.callbacks if isinstance(each, TrainingClock))


def _save(options: TrainOptions, trainer: Trainer, run: CheckedRun, result: TrainResult) -> None:
    """Adapter, record and card, here and on the Hub."""
    saved = save_result(trainer.save_model, run.folder, is_main_process=trainer.is_world_process_zero())
    run.record |= asdict(result)
    write_record(trainer, run.folder, run.record)
    if trainer.is_world_process_zero():
        write_card(run.folder, run.record)
    if "repository" not in run.record:
        return
    if result.status == "finished":
        others = [RUN_FILE, METRICS_FILE, ROUTING_FILE, CARD_FILE, PLOT_FILE]
        upload(run.folder, [*saved, *others], run.record["repository"], options)
    else:
        logger.warning("Not uploaded to %s: the run is not finished.", run.record["repository"])


def main(options: TrainOptions) -> int:
    """Run the command and print where the result is.

    Returns:
        The exit code: 0, or 130 after an interruption.
    """
    if options.process_index != 0:  # what all of them would say is said once; errors of every process are shown
        logging.getLogger("mola").setLevel(logging.ERROR)
    result = train(options)
    exit_code = 0 if result.status == "finished" else 130
    if options.process_index != 0:
        return exit_code
    losses = [
        f", {label} loss {result.metrics[name]:.4f}"
        for name, label in (("train_loss", "training"), ("eval_loss", "evaluation"))
        if name in result.metrics
    ]
    print(
        f"{result.status} after {result.steps} steps and {result.seconds:.0f} s{''.join(losses)}; "
        f"{result.trainable_parameters:,} trained values.\nThe adapter is in {result.output_dir}",
        file=sys.stderr,
    )
    if result.status == "interrupted":
        if newest_complete(Path(result.output_dir)) is not None:
            print("Go on with the same command and --resume_from_checkpoint last", file=sys.stderr)
        else:  # as by --save_only_model, or where best weights had been loaded
            print(f"There is no checkpoint to go on from: train on with --adapter {result.output_dir}", file=sys.stderr)
    return exit_code

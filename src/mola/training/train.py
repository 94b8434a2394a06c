"""`mola train`: fine-tune a mixture of LoRA experts with the Trainer of Transformers.

- Options, data and allocation are checked before weights are loaded.
- The run folder holds the adapter, the loss curve and everything needed to repeat or resume the run.
- SIGINT and SIGTERM stop the run and save a checkpoint if possible; `--resume_from_checkpoint last` resumes from it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from mola.errors import MolaError, NotFiniteError
from mola.files.atomic import atomic_write_json
from mola.files.failures import explain_out_of_memory
from mola.insight import ROUTING_FILE
from mola.insight.kernels import kernels_report
from mola.insight.telemetry import ExpertTelemetry, drop_later_lines
from mola.options.command_line import next_steps
from mola.reporting.commands import commands_after_training
from mola.reporting.findings import find_training_fault
from mola.reporting.formatting import LOSS_NAMES
from mola.reporting.load_run import Run, losses_by_step
from mola.reporting.model_card import write_card
from mola.skills.adding import commands_of_folder
from mola.training.advice import failures_explained, loading_advice
from mola.training.callbacks import TrainingClock, overflow_explained
from mola.training.checkpoints import RUN_FILE, keep_one, newest_complete, step_of_saved_weights
from mola.training.checks import CheckedRun, check_run
from mola.training.distributed import loading_unsharded, shards_weights, uses_fsdp
from mola.training.launch import check_nproc
from mola.training.model import build_model
from mola.training.needed_logits import NeededLogits
from mola.training.options import TrainOptions
from mola.training.overview import overview
from mola.training.run_folder import check_output_dir, locked, start_run
from mola.training.skill import add_trained_skill
from mola.training.trainer import MolaTrainer, compiler_settings, make_trainer

__all__ = ["TrainOptions", "TrainResult", "main", "train"]

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """Outcome of a training run.

    Attributes:
        output_dir: the run folder; it holds the adapter.
        status: "finished", or "interrupted" by a signal.
        steps: number of optimiser steps, including those before a resume.
        metrics: final metrics of the Trainer; with evaluation data also `eval_loss`, of the saved weights.
        trainable_parameters: number of trainable parameters, routers included.
        best_checkpoint: the checkpoint whose weights were saved, or None for the last weights.
        seconds: wall time of training, excluding loading; includes the time before a resume.
        warning: one line if the losses show a fault, see `mola.reporting.findings.find_training_fault`; else None.
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
    """Fine-tune a model.

    Args:
        options: see `TrainOptions`.
        callbacks: more callbacks of Transformers' Trainer, called after mola's own.

    Returns:
        The result; the adapter is in `options.output_dir`.

    Raises:
        MolaError: options or data are wrong (before weights are loaded), or memory or disk space ran out.
        NotFiniteError: the loss, a weight or a router's logits are not finite; a subclass of MolaError.
    """
    check_nproc(options.nproc)
    options = copy.copy(options)  # some options are changed below; the caller's object is left unchanged
    if not (shards_weights(options) or getattr(options.accelerator_config, "use_configured_state", False)):
        AcceleratorState._reset_state()  # it may hold the mixed-precision setting of an earlier run
    is_main = options.process_index == 0
    with failures_explained(options):
        with options.main_process_first(local=False):
            folder = check_output_dir(options)
        with locked(folder) if is_main else contextlib.nullcontext():
            with loading_unsharded():
                run = check_run(options, folder)
                with explain_out_of_memory(loading_advice(options)):
                    model = build_model(options, run.config, run.adapter, run.checkpoint)
            has_kernels = run.adapter.peft_type == "MOLA" and not uses_fsdp(options)  # FSDP moves weights only later
            if is_main and options.verbose and has_kernels:
                _log_kernels(options, model)
            trainer = make_trainer(options, model, run, callbacks)
            if is_main:
                logger.info(
                    overview(options, model, run, needed_logits=isinstance(trainer.data_collator, NeededLogits))
                )

            # An earlier run in the folder is replaced only after every process has got this far.
            PartialState().wait_for_everyone()
            if is_main:
                start_run(run.folder, run.checkpoint, overwrite=options.overwrite_output_dir)
            run.record["num_experts"] = getattr(model.active_peft_config, "num_experts", 1)  # LoRA has no such field
            run.record["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
            if options.push_to_hub:
                run.record["repository"] = trainer.hub_model_id
            _write_record(trainer, run, status="running")

            metrics, seconds = _train_and_evaluate(options, trainer, run)
            result = _result_of(options, trainer, run, metrics, seconds)
            _save(options, trainer, run, result)
            if options.skill is not None and result.status == "finished" and is_main:
                base = None if shards_weights(options) else model.get_base_model().eval()
                add_trained_skill(options, run.folder, base)
            return result


def _log_kernels(options: TrainOptions, model: PeftModel) -> None:
    mixed = options.mixed_dtype
    with torch.autocast(options.device.type, mixed, enabled=mixed is not None):  # the same autocast as in training
        for choice in kernels_report(model, modes=["training"]):
            logger.info("Kernels: %s", choice)


def _write_record(trainer: MolaTrainer, run: CheckedRun, **more: Any) -> None:
    if trainer.is_world_process_zero():
        atomic_write_json(run.folder / RUN_FILE, {**run.record, **more})


def _train_and_evaluate(options: TrainOptions, trainer: MolaTrainer, run: CheckedRun) -> tuple[dict[str, Any], float]:
    """Train, and evaluate the final weights unless they have been. Returns the metrics, and the seconds of training."""
    interruption = trainer.interruption
    telemetry = ExpertTelemetry(run.folder / ROUTING_FILE, run.checkpoint)
    if options.expert_telemetry:
        telemetry.add_to(trainer)
    elif trainer.is_world_process_zero():
        drop_later_lines(run.folder / ROUTING_FILE, run.steps_before_resume)
    try:
        with _failure_recorded(options, trainer, run):
            with overflow_explained(trainer), compiler_settings(trainer):
                checkpoint = str(run.checkpoint) if run.checkpoint else None
                metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
            seconds = _seconds(trainer)
            if trainer.state.global_step == run.steps_before_resume:
                metrics.pop("train_loss", None)  # no step was trained
            interruption.share_signal(options)
            if run.data.evaluation is not None and interruption.shared_signal is None:
                evaluation = _recorded_evaluation(options, trainer, run)
                if evaluation is None:
                    with interruption.stop_on_signal():
                        evaluation = trainer.evaluate()
                    interruption.share_signal(options)
                metrics.update(evaluation or {})
            if interruption.shared_signal is not None and trainer.state.global_step > run.steps_before_resume:
                trainer.save_last_step()
            return metrics, seconds
    finally:
        interruption.restore()
        telemetry.close()


def _recorded_evaluation(options: TrainOptions, trainer: MolaTrainer, run: CheckedRun) -> dict[str, Any] | None:
    """The metrics of the evaluation during training of the weights that are saved; None if none measured them."""
    step = step_of_saved_weights(options, trainer.state)
    if step <= run.steps_before_resume and not run.evaluates_as_before:
        return None
    entries = [entry for entry in trainer.state.log_history if entry["step"] == step and "eval_loss" in entry]
    return {name: value for name, value in entries[-1].items() if name.startswith("eval_")} if entries else None


@contextlib.contextmanager
def _failure_recorded(options: TrainOptions, trainer: MolaTrainer, run: CheckedRun) -> Iterator[None]:
    """Write the record of a failed run if the block ends with an error, and re-raise the error."""
    try:
        # The record must hold the explained error, so it is explained here, before `train` does it.
        with failures_explained(options):
            yield
    except BaseException as error:
        if isinstance(error, NotFiniteError):
            error.was_interrupted = trainer.interruption.received_here is not None
        failure = {"error": str(error) or type(error).__name__, "seconds": _seconds(trainer)}
        failure |= {"steps": trainer.state.global_step, "max_steps": trainer.state.max_steps}
        with contextlib.suppress(MolaError):  # the disk may be full
            _write_record(trainer, run, status="failed", **failure)
        raise


def _seconds(trainer: Trainer) -> float:
    """Seconds of training until now. Resuming may replace the clock callback, so look it up."""
    return next(each.seconds for each in trainer.callback_handler.callbacks if isinstance(each, TrainingClock))


def _result_of(
    options: TrainOptions, trainer: MolaTrainer, run: CheckedRun, metrics: dict[str, Any], seconds: float
) -> TrainResult:
    result = TrainResult(
        output_dir=str(run.folder),
        status="finished" if trainer.interruption.shared_signal is None else "interrupted",
        steps=trainer.state.global_step,
        metrics=metrics,
        trainable_parameters=run.record["trainable_parameters"],
        best_checkpoint=trainer.state.best_model_checkpoint if options.load_best_model_at_end else None,
        seconds=seconds,
    )
    losses = losses_by_step(trainer.state.log_history, step_of_saved_weights(options, trainer.state))
    fault = find_training_fault(Run(run.folder, {**run.record, **asdict(result)}, losses))
    if fault is not None:
        result.warning = str(fault)
        logger.warning(result.warning)
    if options.load_best_model_at_end and result.status == "finished" and result.best_checkpoint is None:
        logger.warning("No evaluation ran that could choose a best checkpoint: the last weights are kept.")
    return result


def _save(options: TrainOptions, trainer: MolaTrainer, run: CheckedRun, result: TrainResult) -> None:
    """Write adapter, record and model card, and upload them with `push_to_hub`."""
    trainer.save_model()
    run.record |= asdict(result)
    if options.auto_find_batch_size:
        samples = trainer._train_batch_size * options.gradient_accumulation_steps * options.world_size
        run.record["effective_batch_size"] = samples
    _write_record(trainer, run)
    if trainer.is_world_process_zero():
        write_card(run.folder, run.record)
    if options.keeps_one and result.status == "finished" and options.should_save:
        keep_one(run.folder, step_of_saved_weights(options, trainer.state))
    if options.push_to_hub and result.status == "finished":
        logger.info("The run is finished. Uploading %s.", run.folder)
        trainer.push_to_hub(commit_message="Adapter trained with mola", revision=options.hub_revision)
    elif options.push_to_hub:
        logger.warning("Not uploaded to %s: the run is not finished.", run.record["repository"])


def main(options: TrainOptions) -> int:
    """Run the command, and print where the result is and which commands come next.

    Returns:
        The exit code: 0, or 130 after an interruption.
    """
    is_main = options.process_index == 0
    if not is_main:  # only the main process logs, but every process shows its errors
        logging.getLogger("mola").setLevel(logging.ERROR)
    result = train(options)
    if is_main:
        losses = [
            f", {label} {result.metrics[name]:.4f}" for name, label in LOSS_NAMES.items() if name in result.metrics
        ]
        print(
            f"{result.status} after {result.steps} steps and {result.seconds:.0f} s{''.join(losses)}.\n"
            f"The adapter is in {result.output_dir}",
            file=sys.stderr,
        )
    if result.status == "finished":
        if is_main:
            of_run = None if options.into else commands_after_training(Path(result.output_dir))
            print(next_steps(*(of_run or commands_of_folder(str(options.into)))), file=sys.stderr)
        return 0
    if is_main:
        next_step = "Resume with the same command and --resume_from_checkpoint last"
        if (
            newest_complete(Path(result.output_dir)) is None
        ):  # after `save_only_model`, or if the best weights were loaded
            next_step = f"No checkpoint to resume from: continue training with --adapter {result.output_dir}"
        print(next_step, file=sys.stderr)
    return 130

"""`MolaTrainer`: the Trainer of Transformers, with mola's checkpoints, collator, callbacks and optimiser groups."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from peft import PeftModel
from torch.optim import Optimizer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from mola.files.atomic import flush_to_disk
from mola.models.base_model import max_positions
from mola.training.callbacks import (
    AveragedWeights,
    CheckpointLast,
    FiniteLoss,
    FrozenInput,
    MetricsFile,
    ResumedRun,
    TrainingClock,
)
from mola.training.checkpoints import STATE_FILE
from mola.training.checks import CheckedRun, library_errors
from mola.training.distributed import keep_dtypes, register_experts, shards_weights
from mola.training.interruption import Interruption
from mola.training.needed_logits import NeededLogits, computes_needed_logits
from mola.training.option_checks import name_of
from mola.training.options import TrainOptions
from mola.training.packing import PackedBatches, check_packing, uses_flash_attention
from mola.training.run_folder import METRICS_FILE, SAVING, move_result
from mola.tuner.loraplus import split_groups

_PAD_TO_MULTIPLE_OF = 8  # suits the kernels of most hardware; the loss ignores padding


def make_trainer(
    options: TrainOptions, model: PeftModel, run: CheckedRun, callbacks: Sequence[TrainerCallback] = ()
) -> MolaTrainer:
    """A trainer with mola's collator, callbacks and optimiser.

    With sharded weights the optimiser is made only when training begins. `callbacks` are called after mola's own.

    Raises:
        MolaError: options of the Trainer conflict, or the optimiser cannot be made.
    """
    collate: Any = DataCollatorForSeq2Seq(run.tokenizer, pad_to_multiple_of=_padding(options, model))
    if options.packing:
        check_packing(model, options.mixed_dtype)
        collate = PackedBatches(collate, run.tokenizer.pad_token_id, uses_flash_attention(model))
    if computes_needed_logits(model, options):
        collate = NeededLogits(collate)
    interruption = Interruption()
    # The order matters: `Interruption` requests a checkpoint, `CheckpointLast` may postpone it, and the weights are
    # replaced by averages and checked before they are saved. Each callback's docstring says what it does.
    mola_callbacks: list[TrainerCallback] = [
        MetricsFile(run.folder / METRICS_FILE, run.checkpoint),
        interruption,
        CheckpointLast(),
        AveragedWeights(),
        FiniteLoss(),
        FrozenInput(),
        *([ResumedRun(run.checkpoint.parent)] if run.checkpoint is not None else []),
        TrainingClock(),
    ]
    with library_errors("the trainer"):
        trainer = MolaTrainer(
            model=model,
            args=options,
            train_dataset=run.data.train,
            eval_dataset=run.data.evaluation,
            data_collator=collate,
            processing_class=run.tokenizer,
            callbacks=[*mola_callbacks, *callbacks],
        )
    trainer.interruption, trainer.steps_before_resume = interruption, run.steps_before_resume
    keep_dtypes(trainer)
    register_experts(trainer)
    if not shards_weights(options):
        with library_errors(f"`optim` {name_of(options.optim)}"):
            trainer.create_optimizer()
    return trainer


def _padding(options: TrainOptions, model: PeftModel) -> int | None:
    """The multiple to which batch lengths are padded; None if padding could exceed the model's maximum length."""
    limit = max_positions(model.config)
    longest = math.ceil(options.cutoff_len / _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
    return None if limit is not None and longest > limit else _PAD_TO_MULTIPLE_OF


class MolaTrainer(Trainer):
    """The Trainer of Transformers, for `TrainOptions` and an adapter."""

    interruption: Interruption
    steps_before_resume = 0
    _checkpoint_root: str | None = None  # folder in which a checkpoint is being written
    _operations_per_token: int | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Make the optimiser. With `loraplus_lr_ratio` the matrices B have their own learning rate."""
        is_new = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        ratio: float | None = self.args.loraplus_lr_ratio  # type: ignore[attr-defined]
        return split_groups(optimizer, model, ratio) if is_new and ratio is not None else optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        # Each group holds the samples of one optimiser step, so that these have similar lengths.
        sampler.batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededGroups(sampler, seed, lambda: int(self.state.epoch or 0))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate like the Trainer, but each process's loss is the mean over its own tokens.

        With `average_tokens_across_devices` the Trainer would also count the tokens of the duplicate samples that pad
        the last batch.
        """
        is_averaged = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = is_averaged

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Like the Trainer, but measure the operations per token only once, not for every batch."""
        tokens = inputs["input_ids"].numel()
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) // tokens
        return self._operations_per_token * tokens

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log like the Trainer, but `train_loss` is the mean over all processes and over the steps since a resume."""
        if "train_loss" in logs:
            steps = self.state.global_step - self.steps_before_resume
            loss = self._total_loss_scalar / steps if steps else 0.0
            if steps and self.args.world_size > 1:
                own_loss = torch.tensor(loss, dtype=torch.float32, device=self.args.device)
                loss = float(self.accelerator.reduce(own_loss, "mean"))
            logs["train_loss"] = loss
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ checkpoints and the result

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_root or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint in a temporary folder and rename it, so that a checkpoint is complete or absent."""
        folder = Path(str(self.args.output_dir))
        final_folder = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.save_strategy == SaveStrategy.BEST:
            self.state.best_global_step = self.state.global_step  # Transformers 5.2 does not record this
        root = folder / f"{SAVING}checkpoint"
        self._checkpoint_root = str(root)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint_root = None
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == final_folder or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()  # all processes must have written their random state
        if self.args.should_save:
            written = root / final_folder.name
            self.state.save_to_json(str(written / STATE_FILE))  # again, with the final path of the best checkpoint
            flush_to_disk(*(path for path in written.rglob("*") if path.is_file()), written)
            shutil.rmtree(final_folder, ignore_errors=True)
            written.rename(final_folder)
            root.rmdir()
            flush_to_disk(folder)  # before an older checkpoint is removed
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_last_step(self) -> None:
        """Save a checkpoint of the last step unless there is one. Called after a signal, even in the final evaluation.

        With `load_best_model_at_end` nothing is saved: the model then has the best weights, not those of the last step.
        """
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if not (folder.is_dir() or self.args.load_best_model_at_end):
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter. Without `output_dir` it goes to the run folder, by way of a temporary folder."""
        if output_dir is not None:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(str(self.args.output_dir))
        with tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as temporary:
            super().save_model(temporary, _internal_call=True)
            if self.is_world_process_zero():
                move_result(Path(temporary), folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `train` has written mola's own model card, which `push_to_hub` uploads."""

    def _save(self, *args: Any, **kwargs: Any) -> None:
        token, self.args.hub_token = (
            self.args.hub_token,
            None,
        )  # the arguments are saved beside the weights, without the token
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args.hub_token = token


class SeededGroups(LengthGroupedSampler):
    """Batches of samples of similar length, in an order that depends only on the seed and the epoch.

    Transformers draws the order from the random numbers of the run. After resuming within an epoch the order would
    differ, so some samples would repeat and others be skipped; and each process would have a different order.

    Args:
        sampler: source of the lengths and of the batch size.
        seed: data seed.
        get_epoch: returns the number of the epoch that is about to begin.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, get_epoch: Callable[[], int]) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths)
        self._seed, self._get_epoch = seed, get_epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._get_epoch())
        return super().__iter__()


@contextlib.contextmanager
def compiler_settings(trainer: Trainer) -> Iterator[None]:
    """Settings of Accelerate and torch for `torch_compile` while a trainer trains in this block.

    Batch size and length are dynamic dimensions from the first batch on: one graph serves all batches of several
    samples, and one more serves batches of one sample. Layers that are computed again in the backward pass (activation
    checkpointing) do not record their router outputs a second time.
    """
    args = trainer.args
    # All trainers of a process share this state, so runs without `torch_compile` reset it.
    trainer.accelerator.state.dynamo_plugin = (
        TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
        if args.torch_compile
        else TorchDynamoPlugin()
    )
    dynamo_settings = {"skip_fwd_side_effects_in_bwd_under_checkpoint": True}
    with torch._dynamo.config.patch(dynamo_settings) if args.torch_compile else contextlib.nullcontext():
        yield

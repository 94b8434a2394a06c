"""The Trainer of Transformers with what it leaves to its users."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import infer_device
from torch.optim import Optimizer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.training_args import OptimizerNames

from mola.errors import MolaError
from mola.files.atomic import keep_on_disk
from mola.models.base_model import max_positions
from mola.training.batch_search import SameStart
from mola.training.callbacks import (
    AveragedWeights,
    CheckpointLast,
    FiniteLoss,
    MetricsFile,
    ResumedCheckpoints,
    ResumedRate,
)
from mola.training.checked_run import CheckedRun
from mola.training.checkpoints import check_best_weights, checkpoints_in, rotate
from mola.training.compiling import FrozenInput
from mola.training.digests import CheckpointDigests
from mola.training.grouping import SeededGroups
from mola.training.interruption import Interruption
from mola.training.needed_logits import NeededLogits, computes_needed_logits
from mola.training.options import TrainOptions
from mola.training.run_folder import METRICS_FILE
from mola.training.sharding import is_sharded, keep_dtypes
from mola.training.uncalled import UncalledLinears
from mola.training.zero import name_experts, uses_deepspeed
from mola.tuner.loraplus import split_groups

_PAD_TO_MULTIPLE_OF = 8  # full vector widths; padding counts in no loss


def make_trainer(options: TrainOptions, model: PeftModel, run: CheckedRun, interruption: Interruption) -> MolaTrainer:
    """With mola's collator and callbacks, and an optimiser where it can be made before training."""
    collate: Any = DataCollatorForSeq2Seq(run.tokenizer, pad_to_multiple_of=_multiple(options, model))
    if computes_needed_logits(model, options):
        collate = NeededLogits(collate)
    # In this order: what is to be saved is known first, and is looked at before it is.
    own: list[TrainerCallback] = [
        MetricsFile(run.folder / METRICS_FILE, run.checkpoint),
        interruption,
        CheckpointLast(),
    ]
    own += [SameStart(), AveragedWeights(), FiniteLoss()]  # without sharding: see `check_sharding`
    own += [FrozenInput(), CheckpointDigests()]
    if not (is_sharded(options) or uses_deepspeed(options)):  # whose gradients lie elsewhere
        own.append(UncalledLinears(model))
    try:
        trainer = MolaTrainer(
            model=model,
            args=options,
            train_dataset=run.data.train,
            eval_dataset=run.data.evaluation,
            data_collator=collate,
            processing_class=run.tokenizer,
            callbacks=own,
        )
    except MolaError:
        raise
    except (ImportError, ValueError) as error:  # packages that are missing, options that exclude each other
        raise MolaError(f"the trainer cannot be made with these options: {error}") from error
    if run.checkpoint is not None:
        trainer.add_callback(ResumedCheckpoints(run.checkpoint.parent))
        trainer.add_callback(ResumedRate())
    if options.device.type == "cpu" and infer_device() != "cpu":  # where PEFT would read checkpoints to
        trainer.model.load_adapter = functools.partial(model.load_adapter, torch_device="cpu")  # type: ignore[union-attr, method-assign]
    keep_dtypes(trainer)
    name_experts(trainer)
    if not (is_sharded(options) or uses_deepspeed(options)):  # whose optimiser is of other parameters
        try:
            trainer.create_optimizer()
        except (ImportError, TypeError, ValueError) as error:
            raise MolaError(f"`optim` {OptimizerNames(options.optim).value} cannot be made: {error}") from error
    return trainer


def _multiple(options: TrainOptions, model: PeftModel) -> int | None:
    """Of tokens that batches are padded to; None where padding could lead beyond a model's last position."""
    limit, longest = max_positions(model.config), options.cutoff_len + -options.cutoff_len % _PAD_TO_MULTIPLE_OF
    return None if limit is not None and longest > limit else _PAD_TO_MULTIPLE_OF


class MolaTrainer(Trainer):
    """For `TrainOptions`."""

    _hidden_limit: int | None = None
    _operations_per_token: int | None = None
    first_step = 0  # steps that were done before this call

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The optimiser of the options, with `loraplus_lr_ratio`."""
        is_new = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        ratio: float | None = self.args.loraplus_lr_ratio  # type: ignore[attr-defined]
        return split_groups(optimizer, model, ratio) if is_new and ratio is not None else optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        # Of a step: the size that was found to fit is no argument's, and as many processes share its samples.
        sampler.batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededGroups(sampler, seed, lambda: int(self.state.epoch or 0))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', with each process's loss over its own tokens.

        Shares of the tokens of all processes, which training adds up, would count those that fill the last batch.
        """
        is_shared = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = is_shared

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Transformers', which would walk through all modules for every batch."""
        tokens = inputs["input_ids"].numel()
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) // tokens
        return self._operations_per_token * tokens

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Transformers', with the mean of this call's steps, and of all processes, as the loss of the training.

        Older versions divide by the steps before a resume, too. Of the steps after the last entry each process has its
        own part only.
        """
        is_last, steps = "train_loss" in logs, self.state.global_step - self.first_step
        if is_last and steps:
            loss = self._total_loss_scalar / steps
            if self.args.world_size > 1:
                mine = torch.tensor(loss, dtype=torch.float32, device=self.args.device)
                loss = float(self.accelerator.reduce(mine, "mean"))
            logs["train_loss"] = loss
        elif is_last:
            logs["train_loss"] = 0.0  # of no step; the run's record leaves it out
        super().log(logs, *args, **kwargs)
        if is_last:  # the last thing before the trainer would remove checkpoints
            self._hidden_limit, self.args.save_total_limit = self._limit(), None

    # Transformers removes whatever is called `checkpoint-...` beyond `save_total_limit`: it does not see the limit.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'; of checkpoints only the run's own are removed."""
        try:
            output = super().train(*args, **kwargs)
            self._end_rotation()
            return output
        finally:
            self.args.save_total_limit = self._limit()

    def _load_best_model(self) -> None:
        check_best_weights(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_best = super()._determine_best_metric(*args, **kwargs)
        if is_best and self.args.save_strategy == SaveStrategy.BEST:  # of which Transformers 5.2 keeps no note
            self.state.best_global_step = step = self.state.global_step
            self.state.best_model_checkpoint = str(Path(str(self.args.output_dir)) / f"checkpoint-{step}")
        return is_best

    def _limit(self) -> int | None:
        return self._hidden_limit if self.args.save_total_limit is None else self.args.save_total_limit

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._hidden_limit = limit = self._limit()
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            if limit:  # before an older one goes
                newest = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                keep_on_disk(*(path for path in newest.rglob("*") if path.is_file()), newest, folder)
            rotate(folder, limit, self.state.best_model_checkpoint)

    def save_last_step(self) -> None:
        """A checkpoint of the step that training has come to, if it has none, and the weights are those of this step.

        A signal in the last evaluation would else leave nothing to go on from where `save_strategy` is no.
        """
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if not (folder.is_dir() or self.args.load_best_model_at_end):
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        hidden, token = self.args.save_total_limit, self.args.hub_token
        # The arguments are saved with the weights.
        self.args.save_total_limit, self.args.hub_token = self._limit(), None
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.hub_token = hidden, token

    def _end_rotation(self) -> None:
        """With a limit of one training ends with the best checkpoint alone."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self._limit() == 1:
            for path in checkpoints_in(Path(str(self.args.output_dir))):
                if path.resolve() != Path(best).resolve():
                    shutil.rmtree(path, ignore_errors=True)

    def _save_rng_state(self, output_dir: str) -> None:
        # Next is the trainer's state, which makes a checkpoint complete: not before all processes have written theirs.
        super()._save_rng_state(output_dir)
        PartialState().wait_for_everyone()

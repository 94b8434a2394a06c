"""The Trainer of Transformers with what it leaves to its users."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from torch.optim import Optimizer
from transformers import Trainer

from mola.tuner.loraplus import split_groups


class MolaTrainer(Trainer):
    """For `TrainOptions`."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The optimiser of the options, with `loraplus_lr_ratio`."""
        is_new = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        ratio: float | None = self.args.loraplus_lr_ratio  # type: ignore[attr-defined]
        return split_groups(optimizer, model, ratio) if is_new and ratio is not None else optimizer

    def _save_rng_state(self, output_dir: str) -> None:
        # Next is the trainer's state, which makes a checkpoint complete: not before all processes have written theirs.
        super()._save_rng_state(output_dir)
        PartialState().wait_for_everyone()

"""The Trainer of Transformers with what it leaves to its users."""

from __future__ import annotations

from typing import Any

import torch
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Transformers', with the mean of all processes as the loss of the whole training.

        Of the steps after the last entry each process has its own part only.
        """
        if "train_loss" in logs and self.args.world_size > 1:
            loss = torch.tensor(logs["train_loss"], dtype=torch.float32, device=self.args.device)
            logs["train_loss"] = float(self.accelerator.reduce(loss, "mean"))
        super().log(logs, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        # Next is the trainer's state, which makes a checkpoint complete: not before all processes have written theirs.
        super()._save_rng_state(output_dir)
        PartialState().wait_for_everyone()

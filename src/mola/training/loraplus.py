"""The trainer with another learning rate for `B`, see `mola.tuner.loraplus`."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import Trainer

from mola.tuner.loraplus import split_groups


class LoraPlusTrainer(Trainer):
    """A Trainer whose options have `loraplus_lr_ratio`."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The optimiser of the options; `B` in groups of their own."""
        is_new = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        options: Any = self.args
        model: Any = self.model
        return split_groups(optimizer, model, options.loraplus_lr_ratio) if is_new else optimizer

"""Adapted linears that a model does not call: no expert there learns anything, and nothing else would tell."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mola.tuner.layer import MolaLinear

logger = logging.getLogger(__name__)

_STEPS = 10  # a base model's own expert may get no token in some


class UncalledLinears(TrainerCallback):
    """Warns, after the first steps, of linears whose experts had no gradient in any of them; `model` is the run's."""

    def __init__(self, model: Any) -> None:
        modules = model.named_modules()
        self._left = {name: module for name, module in modules if isinstance(module, MolaLinear)}
        self._steps = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at gradients; called in every step."""
        if not self._left or self._steps >= _STEPS:
            return
        self._steps += 1
        self._left = {
            name: module
            for name, module in self._left.items()
            if all(parameter.grad is None for parameter in module.mola_B.values() if parameter.requires_grad)
        }
        if self._left and (self._steps == _STEPS or state.global_step + 1 >= state.max_steps):
            logger.warning(
                "%d adapted linears were not called in %d steps, such as %s: this model reads their weights, or did "
                "not need them. Their experts learn nothing: leave them out of `target_modules`.",
                *(len(self._left), self._steps, next(iter(self._left))),
            )
            self._left = {}

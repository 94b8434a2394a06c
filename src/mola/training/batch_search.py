"""With `auto_find_batch_size`: a training that begins again, with a smaller batch, begins where the first one did."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mola.training.checkpoints import checkpoints_in, step_in_name


class SameStart(TrainerCallback):
    """Puts back what the trainer leaves as it was after the steps that the memory had sufficed for.

    Weights, optimiser and random numbers; checkpoints of these steps are removed. The copy is on the CPU, and holds
    trained weights only.
    """

    def __init__(self) -> None:
        self._weights: list[tuple[torch.nn.Parameter, torch.Tensor]] | None = None
        self._optimizer: Any = None
        self._random: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember it at the first beginning, put it back at others."""
        if not args.auto_find_batch_size:
            return
        if self._weights is None:
            self._remember(kwargs["model"], kwargs["optimizer"], is_new=not state.global_step)
            return
        with torch.no_grad():
            for parameter, start in self._weights:
                parameter.copy_(start)
        if self._optimizer is not None:  # that of a checkpoint the trainer has loaded again
            kwargs["optimizer"].load_state_dict(copy.deepcopy(self._optimizer))
        if self._random is not None:
            torch.set_rng_state(self._random[0])
            torch.cuda.set_rng_state_all(self._random[1])
        for path in checkpoints_in(Path(args.output_dir or "")) if state.is_world_process_zero else ():
            if step_in_name(path) > state.global_step:
                shutil.rmtree(path)

    def _remember(self, model: Any, optimizer: Any, *, is_new: bool) -> None:
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        self._weights = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in trained]
        if is_new:
            self._optimizer = copy.deepcopy(optimizer.state_dict())
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all()

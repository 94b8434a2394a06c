"""`torch_compile` in a run: what it needs, and what makes one graph serve batches of all lengths."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mola.errors import MolaError

if TYPE_CHECKING:
    from transformers import Trainer

_WRITES_CPP = "inductor"  # torch's own backend; for a CPU it writes C++
_SKIP_SIDE_EFFECTS = {"skip_fwd_side_effects_in_bwd_under_checkpoint": True}


def check_compiler(backend: str, mode: str | None, device: torch.device) -> None:
    """Whether a training step can be compiled.

    Args:
        backend: of `torch.compile`.
        mode: of `torch.compile`, or None.
        device: to train on.

    Raises:
        MolaError: no such backend or mode, or no C++ compiler for a backend that needs one.
    """
    backends = [each.value.lower() for each in DynamoBackend]
    if backend.lower() not in backends:
        raise MolaError(f"`torch_compile_backend` must be one of {', '.join(backends)}: got {backend!r}.")
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise MolaError(f"`torch_compile_mode` must be one of {', '.join(modes)}: got {mode!r}.")
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if backend.lower() == _WRITES_CPP and device.type == "cpu" and shutil.which(compiler) is None:
        raise MolaError(
            f"`torch_compile` needs a C++ compiler on a CPU: {compiler} is not there. Install it, name another one in "
            "the environment variable CXX, or leave `torch_compile` out."
        )


@contextmanager
def compiled_if_asked(trainer: Trainer) -> Iterator[None]:
    """Settings of accelerate and torch while a trainer trains, from its `torch_compile`.

    The number and the length of samples are dynamic from the first batch: one graph serves all batches, one more
    those of a single sample. Layers that are computed again in the backward pass (activation checkpointing) do not
    leave their routers' outputs behind a second time.
    """
    args = trainer.args
    # For plain runs too: all trainers of a process share this state, which keeps the plugin of the first.
    trainer.accelerator.state.dynamo_plugin = (
        TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
        if args.torch_compile
        else TorchDynamoPlugin()
    )
    with torch._dynamo.config.patch(_SKIP_SIDE_EFFECTS) if args.torch_compile else nullcontext():
        yield


class FrozenInput(TrainerCallback):
    """In compiled runs: the embeddings' output asks for a gradient only where re-entrant checkpointing needs it.

    With activation checkpointing Transformers makes it ask for one in every adapted model, by a change to the tensor
    that no graph can hold: layer after layer would run without the compiler.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer has switched checkpointing on by now."""
        settings: Any = args.activation_checkpointing_kwargs or {}
        if args.torch_compile and args.activation_checkpointing and settings.get("use_reentrant") is False:
            kwargs["model"].disable_input_require_grads()

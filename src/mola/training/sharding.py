"""A model sharded over processes (FSDP, DeepSpeed): what a run needs for that, in which dtype it computes.

Asked for by options (`fsdp`, `fsdp_config`, `deepspeed`), or by `accelerate launch` through environment variables.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.version import Version
from transformers.training_args import OptimizerNames

from mola.errors import MolaError
from mola.training.zero import launched_with, stage_of_checkpoint, uses_deepspeed, zero_stage

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_FSDP_ACCELERATE = "1.15"
_FULL = "FULL_STATE_DICT"
_SHARDED_WEIGHTS = "pytorch_model_fsdp*"
# What a checkpoint was written with.
_FSDP, _ZERO, _ONE_EACH = "FSDP", "DeepSpeed ZeRO-{} in {} processes", "one model per process"


def is_sharded(options: TrainingArguments) -> bool:
    """Whether the run was asked to shard the model with FSDP."""
    return bool(options.fsdp) or launched_with("FSDP")


def check_sharding(options: TrainingArguments, checkpoint: Path | None, is_quantized: bool = False) -> None:
    """Refuse what could not shard, could not save an adapter, or could not be done in several processes.

    Args:
        options: of the run; processes are known.
        checkpoint: where the run goes on from, or None.
        is_quantized: whether the base model's weights are packed.

    Raises:
        MolaError: one process, a CPU, FSDP1, sharded state dicts, a quantised base, a checkpoint of another kind, or a
            search for the batch in several processes.
    """
    if checkpoint is not None:
        _check_checkpoint(options, checkpoint)
    if options.auto_find_batch_size and options.world_size > 1:
        raise MolaError(
            "`auto_find_batch_size` works in one process only: each would look for a batch of its own, and those whose "
            f"memory sufficed would wait for the others. Got {options.world_size} processes. Pass a "
            "--per_device_train_batch_size that fits."
        )
    if not is_sharded(options):
        return
    if options.world_size == 1:
        raise MolaError(
            "`fsdp` shards a model over several processes, this run has one. Start it with torchrun or accelerate "
            "launch, or leave `fsdp` out."
        )
    check_device(options.device)
    if is_quantized:
        raise MolaError(
            "`fsdp` cannot be combined with a quantised base: packed weights are not sharded, every process would "
            "hold all of them. Leave the quantisation out, or train with one model per process "
            "(as the repository's recipes/accelerate/ddp.yaml)."
        )
    if options.optim == OptimizerNames.ADAFACTOR:
        raise MolaError("`optim` adafactor does not work on sharded weights. Pass another, such as adamw_torch.")
    accelerate = importlib.metadata.version("accelerate")
    if Version(accelerate) < Version(_FSDP_ACCELERATE):
        raise MolaError(
            f"`fsdp` needs accelerate {_FSDP_ACCELERATE} or newer, whose checkpoints hold the adapter: here is "
            f"{accelerate}. Upgrade it, or leave `fsdp` out."
        )
    version = _setting(options, "fsdp_version", default="1")
    if version != "2":
        raise MolaError(
            "`fsdp_config` must have version 2: FSDP1 needs all weights of a layer in one dtype, and routers "
            f"stay in float32. Got version {version}; with accelerate launch set fsdp_version: 2."
        )
    saved = _setting(options, "state_dict_type", default="SHARDED_STATE_DICT")
    if saved != _FULL:
        raise MolaError(
            f"`fsdp_config` must have state_dict_type {_FULL}, or no adapter would be saved: got {saved}. With "
            f"accelerate launch set fsdp_state_dict_type: {_FULL}."
        )


def _setting(options: TrainingArguments, name: str, default: str) -> str:
    """A setting of FSDP: an option's, else that of `accelerate launch`, else accelerate's default for FSDP2."""
    variable = f"FSDP_{name.removeprefix('fsdp_').upper()}"
    return str((options.fsdp_plugin_args or {}).get(name) or os.environ.get(variable, default)).upper()


def check_device(device: torch.device) -> None:
    """Refuse a CPU, where accelerate would copy the model to every process instead, without a word.

    Raises:
        MolaError: the device is a CPU.
    """
    if device.type == "cpu":
        raise MolaError(
            "`fsdp` works on GPUs only: on a CPU every process would hold the whole model after all. Leave it out to "
            "train with one copy of the model per process."
        )


def _check_checkpoint(options: TrainingArguments, checkpoint: Path) -> None:
    before = stage_of_checkpoint(checkpoint)
    if next(checkpoint.glob(_SHARDED_WEIGHTS), None) is not None:
        written = _FSDP
    else:
        written = _ONE_EACH if before is None else _ZERO.format(*before)
    if is_sharded(options):
        now = _FSDP
    else:
        now = _ZERO.format(zero_stage(options), options.world_size) if uses_deepspeed(options) else _ONE_EACH
    if written != now:
        raise MolaError(
            f"`resume_from_checkpoint` must go on as the run began: {str(checkpoint)!r} was written with {written}, "
            f"and this run is one with {now}. Start it in the same way, or start a new run with --adapter {checkpoint}."
        )


def keep_dtypes(trainer: Trainer) -> None:
    """Every weight is computed in its own format: mixed precision is left to autocast, as in one process.

    The trainer would have FSDP cast all weights to the format of the base, and so round the routers.
    """
    if trainer.is_fsdp_enabled:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)

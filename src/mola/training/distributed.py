"""Training in several processes: FSDP, DeepSpeed ZeRO, and what each of them cannot do.

Options (`fsdp`, `fsdp_config`, `deepspeed`) choose one of them, or `accelerate launch` does so through environment
variables.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import __version__ as accelerate_version
from packaging.version import Version
from transformers import Trainer, TrainingArguments
from transformers.integrations import deepspeed as integration

from mola.errors import MolaError
from mola.training.option_checks import name_of
from mola.tuner.layer import MolaLinear

_FSDP_ACCELERATE = "1.15"  # the first version whose checkpoints hold the adapter
_GATHERS = "stage3_gather_16bit_weights_on_model_save"


def _launched_with(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def uses_fsdp(options: TrainingArguments) -> bool:
    """Whether a run shards the model with FSDP."""
    return bool(options.fsdp) or _launched_with("FSDP")


def uses_deepspeed(options: TrainingArguments) -> bool:
    """Whether a run uses DeepSpeed."""
    return bool(options.deepspeed) or _launched_with("DEEPSPEED")


def shards_weights(options: TrainingArguments) -> bool:
    """Whether a run shards weights, gradients or the optimiser over its processes."""
    return uses_fsdp(options) or uses_deepspeed(options)


def settle_deepspeed(options: TrainingArguments, device: torch.device) -> None:
    """Prepare options for DeepSpeed on a CPU; Accelerate supports DeepSpeed on GPUs only.

    With `use_cpu` Accelerate would silently copy the model to every process instead.

    Raises:
        MolaError: `deepspeed` is an option, which Accelerate reads on GPUs only.
    """
    if not uses_deepspeed(options) or device.type != "cpu":
        return
    if options.deepspeed:
        raise MolaError(
            "`deepspeed` as an option works on GPUs only. On a CPU start the run with accelerate launch, whose "
            "configuration may name the file as `deepspeed_config_file`."
        )
    options.use_cpu, options.ddp_backend, options.dataloader_pin_memory = False, "gloo", False


def check_distributed(
    options: TrainingArguments, checkpoint: Path | None, is_quantized: bool, has_stacked_experts: bool
) -> None:
    """Check that the chosen kind of distributed training can train the model and save its adapter.

    Args:
        options: of the run; the number of processes is known.
        checkpoint: the checkpoint that the run resumes from, or None.
        is_quantized: whether the base model's weights are packed in memory.
        has_stacked_experts: whether the adapter has `target_parameters`.

    Raises:
        MolaError: FSDP or DeepSpeed would do nothing, round the routers or save no adapter; or the checkpoint was
            written with a different kind of distributed training.
    """
    name = "fsdp" if uses_fsdp(options) else "deepspeed"
    if shards_weights(options) and is_quantized:
        raise MolaError(
            f"`{name}` cannot be combined with a quantised base, whose packed weights are not sharded. Leave the "
            "quantisation out, or train with one copy of the model per process."
        )
    if shards_weights(options) and name_of(options.optim) == "adafactor":
        raise MolaError(
            f"`optim` adafactor needs the rows and columns of whole weights, which `{name}` shards. Pass a different "
            "optimiser, such as adamw_torch."
        )
    if uses_fsdp(options):
        _check_fsdp(options)
    elif uses_deepspeed(options):
        _check_deepspeed(options, has_stacked_experts)
    if checkpoint is not None and (written := _kind_of_checkpoint(checkpoint)) != (now := _kind_of_run(options)):
        raise MolaError(
            f"`resume_from_checkpoint` must continue as the run began: {str(checkpoint)!r} was written with {written}, "
            f"and this run uses {now}. Start it in the same way, or start a new run with --adapter {checkpoint}."
        )


def _check_fsdp(options: TrainingArguments) -> None:
    if options.world_size == 1:
        raise MolaError(
            "`fsdp` shards a model over several processes, this run has one. Start the run with torchrun or accelerate "
            "launch, or leave `fsdp` out."
        )
    if not can_shard(options.device):
        raise MolaError(
            "`fsdp` works on GPUs only: on a CPU every process would hold the whole model. Leave `fsdp` out."
        )
    if Version(accelerate_version) < Version(_FSDP_ACCELERATE):
        raise MolaError(
            f"`fsdp` needs accelerate {_FSDP_ACCELERATE} or newer, whose checkpoints hold the adapter: found "
            f"{accelerate_version}. Upgrade it, or leave `fsdp` out."
        )
    version = _fsdp_setting(options, "fsdp_version", default="1")
    if version != "2":
        raise MolaError(
            f"`fsdp_config` must have version 2: got {version}, which needs all weights of a layer in one dtype, and "
            "routers stay in float32. With accelerate launch set fsdp_version: 2."
        )
    saved = _fsdp_setting(options, "state_dict_type", default="SHARDED_STATE_DICT")
    if saved != "FULL_STATE_DICT":
        raise MolaError(
            f"`fsdp_config` must have state_dict_type FULL_STATE_DICT, or no adapter would be saved: got {saved}. With "
            "accelerate launch set fsdp_state_dict_type: FULL_STATE_DICT."
        )


def can_shard(device: torch.device) -> bool:
    """Whether Accelerate shards a model on this kind of device."""
    return device.type != "cpu"


def _fsdp_setting(options: TrainingArguments, name: str, default: str) -> str:
    """A setting of the option `fsdp_config`, else of `accelerate launch`, else Accelerate's default."""
    variable = f"FSDP_{name.removeprefix('fsdp_').upper()}"
    return str((options.fsdp_plugin_args or {}).get(name) or os.environ.get(variable, default)).upper()


def _check_deepspeed(options: TrainingArguments, has_stacked_experts: bool) -> None:
    stage = _zero_stage(options)
    plugin: Any = options.deepspeed_plugin
    if options.bf16 or options.fp16:
        raise MolaError(
            "`dtype` must be float32 with DeepSpeed, which casts every weight in half precision, routers included. "
            "Pass --dtype float32, or use FSDP, which keeps each weight's own format."
        )
    if stage not in (2, 3):
        raise MolaError(
            f"`deepspeed` must have ZeRO stage 2 or 3: got {stage}. Set zero_stage, or leave DeepSpeed out to train "
            "with one copy of the model per process."
        )
    if stage == 3 and not plugin.hf_ds_config.is_true(f"zero_optimization.{_GATHERS}"):
        raise MolaError(
            f"`deepspeed` with ZeRO-3 must have {_GATHERS} true, or no adapter would be saved. With accelerate launch "
            "set zero3_save_16bit_model: true."
        )
    if stage == 3 and has_stacked_experts:
        raise MolaError(
            "`target_parameters` cannot be trained with ZeRO-3: a layer reads these weights before DeepSpeed gathers "
            "them. Set zero_stage 2, or leave `target_parameters` out."
        )


def _zero_stage(options: Any) -> int:
    stage: int = options.deepspeed_plugin.hf_ds_config.get_value("zero_optimization.stage", 0)
    return stage


def _kind_of_run(options: TrainingArguments) -> str:
    if uses_fsdp(options):
        return "FSDP"
    if uses_deepspeed(options):
        return f"DeepSpeed ZeRO-{_zero_stage(options)} in {options.world_size} processes"
    return "one model per process"


def _kind_of_checkpoint(checkpoint: Path) -> str:
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        return "FSDP"
    processes = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    if not processes:
        return "one model per process"
    stage = 3 if any(checkpoint.glob("global_step*/zero_pp_rank_*model_states.pt")) else 2
    return f"DeepSpeed ZeRO-{stage} in {processes} processes"


def keep_dtypes(trainer: Trainer) -> None:
    """Let FSDP compute with every weight in its own format; autocast does the mixed precision.

    The Trainer would have FSDP cast all weights to the base model's format, which would round the routers.
    """
    if trainer.is_fsdp_enabled:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


@contextlib.contextmanager
def loading_unsharded() -> Iterator[None]:
    """Build and load models without sharding in this block.

    With ZeRO-3 Transformers would shard every weight while it loads, which fails for models on the meta device. The
    weights are sharded when training begins.
    """
    settings = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = settings


def register_experts(trainer: Trainer) -> None:
    """Tell ZeRO-3 which weights a `MolaLinear` computes with.

    ZeRO-3 gathers the weights of a module when the module is called. Experts are in a dictionary, which is never
    called.
    """
    if trainer.is_deepspeed_enabled:
        import deepspeed

        model: Any = trainer.model
        for layer in (module for module in model.modules() if isinstance(module, MolaLinear)):
            for weights in (layer.mola_A, layer.mola_B, layer.mola_router):
                for parameter in weights.values():
                    deepspeed.zero.register_external_parameter(layer, parameter)


def gathered(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """A block in which a sharded weight is whole. With ZeRO-3 all processes must enter the block."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter)

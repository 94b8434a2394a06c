"""DeepSpeed ZeRO: what a run needs for it, asked for by `accelerate launch` or by the option `deepspeed`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import deepspeed as integration
from transformers.training_args import OptimizerNames

from mola.errors import MolaError
from mola.tuner.layer import MolaLinear

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_GATHERS = "stage3_gather_16bit_weights_on_model_save"


def launched_with(name: str) -> bool:
    """Whether `accelerate launch` was told to use it: DEEPSPEED or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def uses_deepspeed(options: TrainingArguments) -> bool:
    """Whether a run was asked to use DeepSpeed."""
    return bool(options.deepspeed) or launched_with("DEEPSPEED")


def settle_backend(options: TrainingArguments, device: torch.device) -> None:
    """On a CPU: what accelerate, which has DeepSpeed for GPUs, has to be told.

    Raises:
        MolaError: DeepSpeed is not installed, would compute on a GPU all the same, or was not asked for by
            `accelerate launch`.
    """
    if not uses_deepspeed(options):
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise MolaError("`deepspeed` is not installed. Run: pip install 'mola-peft[deepspeed]'.")
    if device.type != "cpu":
        return
    if options.deepspeed:
        raise MolaError(
            "`deepspeed` as an option works on GPUs only. On a CPU start the run with accelerate launch and a "
            "configuration such as the repository's recipes/accelerate/zero3.yaml, which may name the file as "
            "`deepspeed_config_file`."
        )
    if torch.cuda.is_available():
        raise MolaError("`use_cpu` does not keep DeepSpeed from a GPU: hide it with CUDA_VISIBLE_DEVICES=''.")
    # Told of a CPU, accelerate would copy the model to every process instead, without a word.
    options.use_cpu, options.ddp_backend, options.dataloader_pin_memory = False, "gloo", False


def check_deepspeed(options: TrainingArguments, is_quantized: bool) -> None:
    """Refuse what would round routers, save no adapter, not load a checkpoint again, or was never tried.

    Args:
        options: of the run; processes are known.
        is_quantized: whether the base model's weights are packed.

    Raises:
        MolaError: half precision, a quantised base, another stage than 2 and 3, or ZeRO-3 that gathers no weights to
            save them.
    """
    if is_quantized:
        raise MolaError(
            "`deepspeed` cannot be combined with a quantised base: its checkpoints do not load into packed weights. "
            "Leave the quantisation out, or train with one model per process (as the repository's "
            "recipes/accelerate/ddp.yaml)."
        )
    if options.auto_find_batch_size:
        raise MolaError(
            "`auto_find_batch_size` cannot be used with DeepSpeed: what steps have changed before the memory ran out "
            "cannot be put back. Pass a --per_device_train_batch_size that fits."
        )
    if options.optim == OptimizerNames.ADAFACTOR:
        raise MolaError(
            "`optim` adafactor cannot be used with DeepSpeed, which flattens weights: its moments are of rows and "
            "columns. Pass another, such as adamw_torch."
        )
    if options.bf16 or options.fp16:
        raise MolaError(
            "`dtype` must be float32 with DeepSpeed: in half precision it casts every weight, and routers stay in "
            "float32. Pass --dtype float32, or use FSDP, which keeps each weight's own format."
        )
    if zero_stage(options) not in (2, 3):
        raise MolaError(
            f"`deepspeed` must have ZeRO stage 2 or 3: got {zero_stage(options)}. Set zero_stage, or leave DeepSpeed "
            "out to train with one copy of the model per process."
        )
    plugin: Any = options.deepspeed_plugin
    if zero_stage(options) == 3 and not plugin.hf_ds_config.is_true(f"zero_optimization.{_GATHERS}"):
        raise MolaError(
            f"`deepspeed` with ZeRO-3 must have {_GATHERS} true, or no adapter would be saved. With accelerate launch "
            "set zero3_save_16bit_model: true."
        )


def check_stacked(options: TrainingArguments, config: Any) -> None:
    """Refuse stacked experts with ZeRO-3: a layer reads them before their module is called, which gathers them.

    Raises:
        MolaError: the adapter's configuration names some.
    """
    if uses_deepspeed(options) and zero_stage(options) == 3 and getattr(config, "target_parameters", None):
        raise MolaError(
            f"`target_parameters` {config.target_parameters} cannot be trained with ZeRO-3, which shares them out: set "
            "zero_stage 2, or leave them out."
        )


def zero_stage(options: TrainingArguments) -> int:
    """Which of DeepSpeed's ways to share out a run has."""
    plugin: Any = options.deepspeed_plugin
    return plugin.hf_ds_config.get_value("zero_optimization.stage", 0)


def stage_of_checkpoint(checkpoint: Path) -> tuple[int, int] | None:
    """ZeRO stage and number of processes that wrote a checkpoint; None if it is not one of DeepSpeed."""
    processes = len(list(checkpoint.glob("global_step*/*optim_states.pt")))
    shares_weights = next(checkpoint.glob("global_step*/zero_pp_rank_*model_states.pt"), None) is not None
    return (3 if shares_weights else 2, processes) if processes else None


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Models in this block are built and loaded as without DeepSpeed.

    Transformers would share out every weight while it is loaded, those of models on the meta device too, which fails.
    The experts, whose shapes are read from the base's weights, are shared out with them when training begins.
    """
    settings = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = settings


def name_experts(trainer: Trainer) -> None:
    """Tell ZeRO-3 which weights a linear computes with.

    It gathers what a module itself holds when that is called. Experts are held by a dictionary, which nobody calls.
    """
    if trainer.is_deepspeed_enabled:
        import deepspeed

        model: Any = trainer.model
        for layer in (module for module in model.modules() if isinstance(module, MolaLinear)):
            for held in (layer.mola_A, layer.mola_B, layer.mola_router):
                for parameter in held.values():
                    deepspeed.zero.register_external_parameter(layer, parameter)


def gathered(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """Within this block a weight is whole, for all processes have to enter it; without ZeRO-3 it always is."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter)

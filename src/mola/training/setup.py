"""From options to a model that is ready to train; everything that can be wrong is found before weights load."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mola.errors import MolaError
from mola.files.failures import lack_of_memory
from mola.models.adapters import check_adapter
from mola.models.base_model import load_config
from mola.models.cost import cost_of_allocation
from mola.models.devices import DTYPES
from mola.models.loading import check_adapter_fits, load_model
from mola.models.meta import check_attention, model_on_meta
from mola.models.quantization import (
    check_packable,
    check_quantized_base,
    prepare_for_training,
    quantization_record,
    stored_quantization,
)
from mola.models.tokenizer import load_tokenizer
from mola.options.fields import list_between_commas, names_between_commas
from mola.training.options import TRAINING_ONLY, TrainOptions
from mola.training.sharding import is_sharded
from mola.training.trainer_checks import check_optimizer
from mola.training.zero import check_stacked
from mola.tuner import MolaConfig
from mola.tuner.saved_modules import resolve_modules_to_save

logger = logging.getLogger(__name__)


def check_model_options(options: TrainOptions, checkpoint: Path | None = None) -> dict[str, Any]:
    """Check base model, adapter and allocation against the model's configuration; loads no weights.

    Args:
        options: of the run.
        checkpoint: from which it goes on; it has the adapter that a run with `adapter` began with.

    Returns:
        The allocation's totals, as `mola plan --json` prints them; empty when an adapter is continued.

    Raises:
        MolaError: anything that does not fit.
    """
    if options.base_model is None:
        raise MolaError("`base_model` must name a model. Pass --base_model with a folder or a hub id.")
    config = load_config(options.base_model, options.trust_remote_code, options.gguf_file)
    check_quantized_base(options.base_model, config, options, options.device, training=True)
    if options.on_loading or (stored_quantization(config) and options.modules_to_save):
        model = model_on_meta(options.base_model, options.trust_remote_code)
        check_packable(model, options.base_model, list_between_commas(options.modules_to_save, "modules_to_save") or ())
    if options.adapter is not None:
        adapter = str(checkpoint or options.adapter)
        check_adapter(adapter)
        check_settings(options, continued_config(options, adapter))
        check_adapter_fits(options.base_model, adapter, options.trust_remote_code, options.gguf_file)
        return {}
    wanted = adapter_config(options)
    check_settings(options, wanted)
    allocation = cost_of_allocation(
        options.base_model,
        options.adapter_setting("num_experts"),
        options.adapter_setting("top_k"),
        options.adapter_setting("r"),
        options.target_modules,
        options.gguf_file,
        options.trust_remote_code,
        num_experts_pattern=wanted.num_experts_pattern,
        rank_pattern=wanted.rank_pattern,
        target_parameters=wanted.target_parameters,
    )
    if wanted.modules_to_save:
        _check_modules_to_save(wanted.modules_to_save, options)
    return allocation.to_dict()["totals"]


def check_settings(options: TrainOptions, config: PeftConfig) -> None:
    """What options can say that model, machine or adapter cannot do.

    Args:
        options: of a run.
        config: of its adapter.

    Raises:
        MolaError: attention that does not run, an optimiser that cannot be made or train the adapter, losses that have
            no effect.
    """
    check_attention(
        options.attn_implementation,
        options.base_model or "",
        options.trust_remote_code,
        options.gguf_file,
    )
    check_optimizer(options)
    if options.loraplus_lr_ratio is not None and config.peft_type != "MOLA":
        raise MolaError(
            f"`loraplus_lr_ratio` is for mixtures: {options.adapter!r} is a {config.peft_type} adapter. Leave it out."
        )
    check_stacked(options, config)
    _check_router_losses(options, config)
    _check_smoothed_labels(options)


def _check_modules_to_save(names: Sequence[str], options: TrainOptions) -> None:
    """Before the weights are loaded."""
    model = model_on_meta(options.base_model or "", options.trust_remote_code, options.gguf_file)
    resolve_modules_to_save(names, dict(model.named_modules()), is_new=True)


def _check_router_losses(options: TrainOptions, config: PeftConfig) -> None:
    """Those that have no effect; with label smoothing the trainer computes a loss of its own, without any."""
    if options.router_aux_loss_reduction is not None and not getattr(config, "router_aux_loss_coef", None):
        logger.warning(
            "`router_aux_loss_reduction` (%s) is not used: `router_aux_loss_coef` is 0.",
            options.router_aux_loss_reduction,
        )
    names = [name for name in ("router_aux_loss_coef", "router_z_loss_coef") if (getattr(config, name, None) or 0) > 0]
    if options.label_smoothing_factor > 0 and names:
        raise MolaError(
            f"`label_smoothing_factor` ({options.label_smoothing_factor:g}) cannot be combined with `{names[0]}` "
            f"({getattr(config, names[0]):g}), which would have no effect. Leave one out."
        )


def _check_smoothed_labels(options: TrainOptions) -> None:
    """The trainer smooths the labels of the next tokens only where it knows the model's class."""
    if not (options.label_smoothing_factor > 0 and options.trust_remote_code):
        return
    config = load_config(options.base_model or "", True, options.gguf_file)
    name = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", "").rpartition(".")[2]
    if name and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise MolaError(
            f"`label_smoothing_factor` ({options.label_smoothing_factor:g}) cannot be used with the base model's own "
            f"class {name}: Transformers would smooth each token itself instead of the next one. Leave it out."
        )


def adapter_config(options: TrainOptions) -> MolaConfig:
    """The adapter's configuration.

    Raises:
        MolaError: a setting is out of range.
    """
    setting = options.adapter_setting
    plain = ("num_experts", "r", "top_k", "lora_alpha", "lora_dropout")
    patterns = ("num_experts_pattern", "rank_pattern", "alpha_pattern")
    start = setting("init_lora_weights")  # a text on the command line, perhaps a bool in Python
    if isinstance(start, str):
        start = {"true": True, "false": False}.get(start.lower(), start)
    router = ("router_aux_loss_coef", "router_aux_loss_reduction", "router_z_loss_coef", "router_jitter_noise")
    return MolaConfig(
        **{name: setting(name) for name in (*plain, *router, *patterns)},
        use_rslora=bool(setting("use_rslora")),
        init_lora_weights=True if start is None else start,
        target_modules=names_between_commas(setting("target_modules")),
        target_parameters=list_between_commas(setting("target_parameters"), "target_parameters"),
        modules_to_save=list_between_commas(setting("modules_to_save"), "modules_to_save"),
        task_type=TaskType.CAUSAL_LM,
    )


def continued_config(options: TrainOptions, adapter: str) -> PeftConfig:
    """The configuration of an adapter that is trained on, with the training settings that were given.

    Raises:
        MolaError: a setting is out of range, or the adapter's method does not have it.
    """
    config = PeftConfig.from_pretrained(adapter)
    config.base_model_name_or_path = options.base_model  # from here on; PEFT keeps a name that is there
    changes = training_changes(options)
    if not changes:
        return config
    if not isinstance(config, MolaConfig):
        raise MolaError(
            f"`{next(iter(changes))}` can be changed for an adapter of mola only: {adapter!r} is of type "
            f"{config.peft_type}. Leave the option out."
        )
    return replace(config, **changes)


def training_changes(options: TrainOptions) -> dict[str, Any]:
    """Settings that were given for an adapter that is trained on."""
    return {name: getattr(options, name) for name in TRAINING_ONLY if getattr(options, name) is not None}


def recorded_quantization(options: TrainOptions) -> dict[str, Any] | None:
    """How the base model is quantised, for `run.json`; None for plain weights."""
    config = load_config(options.base_model or "", options.trust_remote_code, options.gguf_file)
    return quantization_record(config, options, DTYPES[options.base_dtype])


def stores_packed(options: TrainOptions) -> bool:
    """Whether the base model is quantised in memory, which one from a GGUF file is not."""
    return (recorded_quantization(options) or {}).get("quant_method", "gguf") != "gguf"


def load_tokenizer_for(options: TrainOptions) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, padding on the right: no padded position predicts a real token then."""
    return load_tokenizer(options.base_model or "", "right", options.trust_remote_code, options.gguf_file)


def build_model(options: TrainOptions, checkpoint: Path | None = None) -> PeftModel:
    """Base model with new experts, or with those of `adapter`, ready to train.

    A run that goes on has the adapter of its checkpoint: what is in the folder of `adapter` may be another one now.
    """
    base: Any = load_model(
        options.base_model or "",
        None,
        options.base_dtype,
        "cpu" if is_sharded(options) else options.device,  # which takes its part of each layer, see FSDP
        options.trust_remote_code,
        options.attn_implementation,
        options,
    )
    base = prepare_for_training(base, bool(options.activation_checkpointing), options.activation_checkpointing_kwargs)
    set_seed(options.seed)
    model = _with_adapter(base, options, checkpoint)
    for parameter in model.parameters():  # of `modules_to_save`; experts are in float32
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model


def _with_adapter(base: Any, options: TrainOptions, checkpoint: Path | None) -> PeftModel:
    if options.adapter is None:
        return get_peft_model(base, adapter_config(options))
    adapter = options.adapter if checkpoint is None else str(checkpoint)
    try:
        # Where the model is: by itself PEFT reads them onto a first GPU, whoever uses that.
        how: Any = {"is_trainable": True, "torch_device": str(next(base.parameters()).device)}
        return PeftModel.from_pretrained(base, adapter, config=continued_config(options, adapter), **how)
    except MolaError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        if lack_of_memory(error):
            raise
        raise MolaError(f"`adapter` does not fit the base model: {adapter!r}: {error}") from error

"""From options to a model that is ready to train, and the model checks that need no weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import PretrainedConfig, PreTrainedTokenizerBase, enable_full_determinism, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mola.checkpoints.adapter_settings import read_settings
from mola.checkpoints.recorded_base import lasting_name
from mola.errors import MolaError
from mola.models.adapters import adapter_errors, check_adapter
from mola.models.base_model import load_config
from mola.models.cost import cost_of_allocation
from mola.models.devices import DTYPES
from mola.models.loading import check_adapter_fits, load_model
from mola.models.lora_config import draw_like_one_expert, lora_like
from mola.models.meta import model_on_meta
from mola.models.quantization import (
    check_packable,
    check_quantized_base,
    prepare_for_training,
    quantization_record,
    stored_quantization,
)
from mola.models.tokenizer import load_tokenizer
from mola.options.fields import split_names, split_to_list
from mola.training.distributed import uses_fsdp
from mola.training.fields import ADAPTER_DEFAULTS, TRAINING_ONLY
from mola.training.option_checks import check_given
from mola.training.options import TrainOptions
from mola.training.skill import on_upper_layers
from mola.tuner import MolaConfig
from mola.tuner.saved_modules import resolve_modules_to_save

logger = logging.getLogger(__name__)


def base_config(options: TrainOptions) -> PretrainedConfig:
    """The configuration of the base model.

    Raises:
        MolaError: `base_model` is missing, or has no readable configuration.
    """
    check_given(options, "base_model")
    return load_config(str(options.base_model), options.trust_remote_code, options.gguf_file)


def check_model_options(
    options: TrainOptions, config: PretrainedConfig, checkpoint: Path | None = None
) -> tuple[PeftConfig, dict[str, Any]]:
    """Check base model, adapter and allocation against the base model's configuration; loads no weights.

    A run that resumes from `checkpoint` reads the adapter there, not in the folder `adapter`.

    Returns:
        The configuration of the adapter, and the allocation's totals as `mola plan --json` prints them; the latter is
        empty when an existing adapter or a skill is trained. New experts without any router are a plain LoRA.

    Raises:
        MolaError: base model, adapter and allocation do not fit each other.
    """
    base_model = options.base_model or ""
    check_quantized_base(base_model, config, options, options.device, training=True)
    if options.adapter is None:
        adapter, totals = _new_adapter(options, config, checkpoint)
    else:
        folder, totals = str(checkpoint or options.adapter), {}
        check_adapter(folder)
        adapter = changed_config(options, PeftConfig.from_pretrained(folder))
        adapter.base_model_name_or_path = base_model  # PEFT would keep the earlier name
        check_adapter_fits(base_model, folder, options.trust_remote_code, options.gguf_file, config=config)
    check_losses(options, adapter, config)
    return adapter, totals


def _new_adapter(
    options: TrainOptions, config: PretrainedConfig, checkpoint: Path | None
) -> tuple[PeftConfig, dict[str, Any]]:
    base_model, adapter = options.base_model or "", adapter_config(options)
    model = model_on_meta(base_model, options.trust_remote_code, options.gguf_file, config=config)
    if options.skill is not None:
        return lora_like(on_upper_layers(options, adapter, model), model), {}
    allocation = cost_of_allocation(
        base_model,
        options.num_experts,
        options.adapter_setting("top_k"),
        options.adapter_setting("r"),
        options.target_modules,
        num_experts_pattern=adapter.num_experts_pattern,
        rank_pattern=adapter.rank_pattern,
        target_parameters=adapter.target_parameters,
        model=model,
    )
    totals = allocation.to_dict()["totals"]
    if adapter.modules_to_save:
        if options.quantizes_on_loading or stored_quantization(config):
            check_packable(model, base_model, adapter.modules_to_save)
        resolve_modules_to_save(adapter.modules_to_save, dict(model.named_modules()), is_new=True)
    # Stopped runs of earlier versions continue as the mixtures of one expert that they are.
    is_mixture = checkpoint is not None and read_settings(checkpoint)["peft_type"] == "MOLA"
    if allocation.router_parameters or adapter.target_parameters or is_mixture:
        return adapter, totals
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"):
        if value := getattr(adapter, name):
            logger.warning("`%s` (%g) has no effect: with one expert everywhere there is no router.", name, value)
    return lora_like(adapter, model), totals


def check_losses(options: TrainOptions, adapter: PeftConfig, config: PretrainedConfig) -> None:
    """Check that the router losses have an effect, and that labels are smoothed for the next tokens.

    `adapter` is the adapter's configuration, `config` the base model's.

    Raises:
        MolaError: an option would have no effect, or the loss would be wrong.
    """
    if not options.label_smoothing_factor:
        return
    names = [name for name in ("router_aux_loss_coef", "router_z_loss_coef") if (getattr(adapter, name, None) or 0) > 0]
    if names:
        raise MolaError(
            f"`label_smoothing_factor` ({options.label_smoothing_factor:g}) cannot be combined with `{names[0]}` "
            f"({getattr(adapter, names[0]):g}), which would have no effect. Leave one out."
        )
    # The Trainer shifts the labels only for classes that it knows.
    own_class = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", "").rpartition(".")[2]
    if options.trust_remote_code and own_class and own_class not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise MolaError(
            f"`label_smoothing_factor` ({options.label_smoothing_factor:g}) cannot be used with the base model's own "
            f"class {own_class}: Transformers would smooth each token itself instead of the next one. Leave it out."
        )


def adapter_config(options: TrainOptions) -> MolaConfig:
    """The configuration of new experts, from the options.

    Raises:
        MolaError: a setting is out of range.
    """
    setting = options.adapter_setting
    plain = ("r", "top_k", "lora_alpha", "num_experts_pattern", "rank_pattern", "alpha_pattern", *TRAINING_ONLY)
    start = setting("init_lora_weights")  # a text on the command line, a bool or a text in Python
    if isinstance(start, str):
        start = {"true": True, "false": False}.get(start.lower(), start)
    return MolaConfig(
        **{name: setting(name) for name in plain},
        num_experts=options.num_experts,  # None: the default of `MolaConfig`, which fits a model of any depth
        use_rslora=bool(setting("use_rslora")),
        init_lora_weights=True if start is None else start,
        target_modules=split_names(setting("target_modules")),
        target_parameters=split_to_list(setting("target_parameters"), "target_parameters"),
        modules_to_save=split_to_list(setting("modules_to_save"), "modules_to_save"),
        task_type=TaskType.CAUSAL_LM,
    )


def changed_config(options: TrainOptions, config: PeftConfig) -> PeftConfig:
    """The configuration of an adapter whose training continues, with the options that may change it.

    Raises:
        MolaError: an option is out of range, or the adapter has no such setting.
    """
    changes = training_changes(options)
    for name, value in list(changes.items()):
        if hasattr(config, name):
            continue
        if value != ADAPTER_DEFAULTS[name] or name == "lora_dropout":
            raise MolaError(f"`{name}` cannot be changed: {options.adapter!r} has no such setting. Leave it out.")
        del changes[name]  # a router loss that is off
    return replace(config, **changes) if changes else config


def training_changes(options: TrainOptions) -> dict[str, Any]:
    """The given options that change an adapter whose training continues, by name."""
    return {name: getattr(options, name) for name in TRAINING_ONLY if getattr(options, name) is not None}


def recorded_quantization(options: TrainOptions, config: PretrainedConfig) -> dict[str, Any] | None:
    """How the base model with this configuration is quantised, for `run.json`; None for plain weights."""
    return quantization_record(config, options, DTYPES[options.base_dtype])


def stores_packed(options: TrainOptions, config: PretrainedConfig) -> bool:
    """Whether the base model is quantised in memory. A model from a GGUF file is not."""
    return (recorded_quantization(options, config) or {}).get("quant_method", "gguf") != "gguf"


def load_tokenizer_for(options: TrainOptions, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model with this configuration.

    It pads on the right, so that no padding position predicts a real token.
    """
    source = options.base_model or "", "right", options.trust_remote_code, options.gguf_file
    return load_tokenizer(*source, config=config)


def build_model(
    options: TrainOptions, config: PretrainedConfig, adapter: PeftConfig, checkpoint: Path | None = None
) -> PeftModel:
    """The base model with new experts, or with those of the option `adapter`, ready to train.

    A run with this option that resumes from `checkpoint` uses the experts there: the folder may have changed.
    `adapter` is the configuration from `check_model_options`.

    Raises:
        MolaError: the base model cannot be loaded, or the adapter does not fit it.
    """
    base: Any = load_model(
        options.base_model or "",
        None,
        options.base_dtype,
        "cpu" if uses_fsdp(options) else options.device,  # FSDP moves each process's share to its device
        options.trust_remote_code,
        options.attn_implementation,
        options,
        config=config,
    )
    base = prepare_for_training(base, bool(options.activation_checkpointing), options.activation_checkpointing_kwargs)
    set_all_seeds = enable_full_determinism if options.full_determinism else set_seed
    set_all_seeds(options.seed)
    model: Any
    if options.adapter is None:
        model = get_peft_model(base, adapter)
        start = adapter_config(options).init_lora_weights
        if isinstance(adapter, LoraConfig) and (options.skill is None or start == "principal"):
            set_all_seeds(options.seed)
            draw_like_one_expert(model, start)
    else:
        folder = str(checkpoint or options.adapter)
        device = str(next(base.parameters()).device)  # PEFT itself would read the adapter onto the first GPU
        with adapter_errors(folder):
            model = PeftModel.from_pretrained(base, folder, config=adapter, is_trainable=True, torch_device=device)
    for parameter in model.parameters():  # experts are in float32, `modules_to_save` may not be
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    model.active_peft_config.base_model_name_or_path = lasting_name(options.base_model or "")
    return model

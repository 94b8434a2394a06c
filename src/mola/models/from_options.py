"""Options of the base model that several commands share; checks them and loads what they name."""

import os
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mola.checkpoints.adapter_settings import is_skills_folder, named_adapter
from mola.checkpoints.skills_folder import read_skills
from mola.models.adapters import check_adapter
from mola.models.base_model import load_config, weights_identity
from mola.models.devices import resolve_device, resolve_dtype
from mola.models.loading import load_model
from mola.models.options import ModelOptions
from mola.models.quantization import check_quantization, check_quantized_base
from mola.models.tokenizer import load_tokenizer
from mola.tuner.skills.loras import DEFAULT_MAX_LOADED


def check_model(options: ModelOptions) -> PretrainedConfig:
    """Check the options of the base model; loads no weights.

    Returns:
        The base model's configuration.

    Raises:
        MolaError: the device, dtype, quantisation or model does not exist or does not fit.
    """
    device = resolve_device(options.device)
    check_quantization(options, device, resolve_dtype(options.dtype, device)[0])
    config = load_config(options.base_model, options.trust_remote_code, options.gguf_file)
    check_quantized_base(options.base_model, config, options, device)
    return config


def adapter_for(options: Any) -> str | None:
    """The adapter that the options `adapter` and `skill` mean; see `named_adapter`. Loads no weights of the base model.

    Raises:
        MolaError: the adapter or skills folder cannot be read, there is no such skill, or the skills belong to another
            base model.
    """
    adapter = named_adapter(options.adapter, options.skill)
    if options.adapter is not None and is_skills_folder(options.adapter):
        read_skills(options.adapter).check_base(options.base_model, weights_identity(options.base_model))
    if adapter is not None and not is_skills_folder(adapter):
        check_adapter(adapter)
    return adapter


def adapter_alone(adapter: str | None) -> str | None:
    """The adapter that answers everything; None for a skills folder, whose skills each prompt asks."""
    return None if adapter is not None and is_skills_folder(adapter) else adapter


def tokenizer_for(options: ModelOptions, padding_side: str = "left") -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer; see `mola.models.tokenizer.load_tokenizer`."""
    return load_tokenizer(options.base_model, padding_side, options.trust_remote_code, options.gguf_file)


def model_for(
    options: ModelOptions,
    adapter: str | Mapping[str, str | os.PathLike[str]] | None,
    max_loaded: int = DEFAULT_MAX_LOADED,
) -> PreTrainedModel | PeftModel:
    """Load the base model with its adapters or skills; see `mola.models.loading.load_model`."""
    return load_model(
        options.base_model,
        adapter,
        options.dtype,
        options.device,
        options.trust_remote_code,
        quantization=options,
        max_loaded=max_loaded,
    )

"""Loads base models with their adapters.

- Everything that can be checked without weights is checked first (`load_config`, `check_adapter`,
  `check_adapter_fits`).
- Routers stay in float32 on any base: in bfloat16 a few tokens would choose different experts.
"""

import gc
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.adapter_settings import read_settings
from mola.checkpoints.recorded_base import base_model_of, is_recorded_base
from mola.checkpoints.skills_folder import SkillsFolder, is_skills_folder, read_skills
from mola.errors import MolaError
from mola.files.failures import memory_error_reason
from mola.models.adapters import as_mapping, attach, check_adapter, check_fits, check_lora, warn_other_base
from mola.models.base_model import load_config, weights_identity
from mola.models.devices import resolve_device, resolve_dtype
from mola.models.meta import model_on_meta
from mola.models.quantization import (
    Quantization,
    check_packable,
    check_quantization,
    check_quantized_base,
    finish_loading,
    loading_arguments,
    stored_quantization,
)
from mola.models.skills import attach_skills
from mola.models.tokenizer import load_tokenizer
from mola.tuner import MolaConfig
from mola.tuner.skills.loras import DEFAULT_MAX_LOADED

logger = logging.getLogger(__name__)


def check_adapter_fits(
    base_model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    *,
    config: PretrainedConfig | None = None,
) -> None:
    """Check that a mixture or a LoRA fits its base model, before the weights of the base model are loaded.

    For other methods only PEFT checks the adapter, when it is loaded. `trust_remote_code` skips the check: code shipped
    with the model may not work without weights. `config` is the model's configuration, if it has been read.

    Raises:
        MolaError: the model is of a different kind, or the tensors do not fit the model.
    """
    settings = read_settings(Path(adapter))
    method = settings["peft_type"]
    if trust_remote_code or method not in ("MOLA", "LORA"):
        return
    on_meta = model_on_meta(os.fspath(base_model), gguf_file=gguf_file, config=config)
    try:
        if method == "LORA":
            check_lora(Path(adapter), on_meta, all_names=False)
        else:
            check_fits(on_meta, MolaConfig.from_pretrained(os.fspath(adapter)), read_tensors(Path(adapter)))
    except (MolaError, TypeError) as error:
        recorded = settings.get("base_model_name_or_path")
        if not is_recorded_base(base_model, recorded):
            experts, layers = settings.get("num_experts"), on_meta.config.get_text_config().num_hidden_layers
            is_other_depth = isinstance(experts, list) and len(experts) != layers
            reason = f"trained on {len(experts or [])} layers, the model has {layers}" if is_other_depth else error
            raise MolaError(
                f"`adapter` {os.fspath(adapter)!r} was trained on {recorded!r}, and `base_model` "
                f"{os.fspath(base_model)!r} is a different model, which the adapter does not fit "
                f"({str(reason).rstrip('.')}). Pass --base_model {recorded}."
            ) from error
        if method == "LORA":
            raise
        raise MolaError(f"`adapter` does not fit the base model: {os.fspath(adapter)!r}: {error}") from error


def load_model(
    base_model: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
    *,
    config: PretrainedConfig | None = None,
    max_loaded: int = DEFAULT_MAX_LOADED,
) -> PreTrainedModel | PeftModel:
    """Load a base model with its adapters or skills, ready for inference (eval mode, on its device, weights frozen).

    Args:
        base_model: folder or hub id; by default the one that the adapters record. A skills folder here is the same as
            in `adapter`.
        adapter: an adapter folder, or several as name -> folder (the first is active), or a skills folder; None for
            none.
        dtype: see `resolve_dtype`. Adapters get the dtype of the base; routers stay float32. On quantised layers
            adapters keep the dtype of their file.
        device: see `resolve_device`.
        trust_remote_code: run code shipped with the model.
        attn_implementation: as in Transformers (`"eager"`, `"sdpa"`, ...); None for its default.
        quantization: how to quantise the base; None loads it as it is stored, quantised or not.
        config: the base model's configuration, if it has been read.
        max_loaded: maximum number of skills in memory; further ones are read when they are asked for.

    Returns:
        The model; a `PeftModel` when an adapter was given. With a skills folder it is the base model, whose `skills`
        is a `mola.tuner.skills.runtime.SkillsRuntime`: each prompt asks the skill that knows.

    Raises:
        MolaError: model, adapter or skills are missing or broken, or do not fit each other.
    """
    skills, base_model, adapter = _find_skills(base_model, adapter)
    adapters = as_mapping(adapter)
    name = base_model = base_model_of(base_model, adapters.values())
    configs = {adapter_name: check_adapter(folder) for adapter_name, folder in adapters.items()}
    methods = {adapter_name: each["peft_type"] for adapter_name, each in configs.items()}
    if len({*methods.values()}) > 1:
        raise MolaError(f"`adapter` must be of one method: got {methods}. Load each method into its own model.")
    target = resolve_device(device)
    torch_dtype, reason = resolve_dtype(dtype, target)
    quantization = quantization or Quantization()
    check_quantization(quantization, target, torch_dtype)
    config = config or load_config(base_model, trust_remote_code, quantization.gguf_file)
    check_quantized_base(name, config, quantization, target)
    for folder in adapters.values():
        check_adapter_fits(base_model, folder, trust_remote_code, quantization.gguf_file, config=config)
    _check_base_has_no_adapter(base_model, adapters)
    if skills is not None:
        skills.check_base(name, weights_identity(name))
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code, gguf_file=quantization.gguf_file)
    if quantization.quantizes_on_loading:
        check_packable(model_on_meta(name, trust_remote_code, config=config), name)
    arguments: dict[str, Any] = {"config": config, "dtype": torch_dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    arguments |= loading_arguments(quantization, torch_dtype)
    is_quantized = quantization.quantizes_on_loading or stored_quantization(config) is not None
    if is_quantized:  # packed weights are placed while loading and cannot be moved afterwards
        arguments["device_map"] = {"": target}
    logger.info("Loading %s on %s, %s.", name, target, reason)
    if target.type != "cpu":
        gc.collect()  # frees an earlier model, whose hooks refer back to the model
    model = _load_base(name, arguments)
    if not is_quantized:
        model = model.to(target)
    finish_loading(model)
    for adapter_name, folder in adapters.items():
        warn_other_base(base_model, folder, configs[adapter_name])
        model = attach(model, adapter_name, os.fspath(folder))
    if len(adapters) > 1:  # with tied embeddings PEFT activates the trained tokens of the last adapter
        model.set_adapter(next(iter(adapters)))
    model.requires_grad_(False).eval()
    if skills is not None:
        attach_skills(model, skills, tokenizer, max_loaded)
    return model


def _find_skills(base_model: Any, adapter: Any) -> tuple[SkillsFolder | None, Any, Any]:
    """The skills folder among the two arguments if there is one, the base model, and the adapter."""
    if adapter is None and base_model is not None and is_skills_folder(base_model):
        base_model, adapter = None, base_model
    if isinstance(adapter, Mapping):
        for name, folder in adapter.items():
            if is_skills_folder(folder):
                raise MolaError(
                    f"`adapter` must be one skills folder alone: {name!r} names {os.fspath(folder)!r} among adapters. "
                    "Pass the folder without a name."
                )
    if adapter is None or isinstance(adapter, Mapping) or not is_skills_folder(adapter):
        return None, base_model, adapter
    skills = read_skills(adapter)
    return skills, skills.base_model if base_model is None else base_model, None


def _load_base(name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except MolaError:
        raise
    except (OSError, ImportError, ValueError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        if memory_error_reason(error):
            raise
        hint = ""
        if not isinstance(error, (OSError, ImportError, ValueError)):
            hint = ". Its weights may be damaged or made for a different configuration: copy the model again."
        raise MolaError(f"`base_model` cannot be loaded: {name!r}: {error}{hint}") from error


def _check_base_has_no_adapter(base_model: str | os.PathLike[str], adapters: Mapping[str, Any]) -> None:
    """Check whether the base model's folder holds an adapter itself, which Transformers loads silently.

    Raise if a further adapter is to be loaded, else warn.
    """
    if not os.path.isfile(Path(base_model) / "adapter_config.json"):
        return
    if adapters:
        raise MolaError(
            f"`adapter` cannot be added to a base model that has one already: {os.fspath(base_model)!r} holds an "
            "adapter_config.json. Pass a folder with the base model alone."
        )
    logger.warning("%s holds an adapter too, which is loaded with the base model.", os.fspath(base_model))

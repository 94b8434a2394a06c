"""Differences between the supported versions of libraries.

Each function names the first version that no longer needs it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def gguf_arguments(file: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that unpack a GGUF file: Transformers 5.17 and newer need a `GgufConfig`."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"gguf_file": file} | ({"quantization_config": config(gguf_file=file, dequantize=True)} if config else {})


def own_tokenizers() -> dict[str, Any]:
    """Arguments of `AutoTokenizer` that choose Transformers' own tokenizers even if mistral-common is installed.

    Empty before Transformers 5.16, whose `AutoTokenizer` may have no such argument.
    """
    from transformers.models.auto import tokenization_auto

    return {"mistral_format": False} if hasattr(tokenization_auto, "_use_mistral_format") else {}


def has_activation_checkpointing() -> bool:
    """Whether `TrainingArguments` has `activation_checkpointing`, as since Transformers 5.21."""
    from transformers import TrainingArguments

    return hasattr(TrainingArguments, "activation_checkpointing_kwargs")


def share_checkpointing(arguments: Any) -> None:
    """Before Transformers 5.21, copy activation checkpointing and its settings to their older names as well."""
    if not has_activation_checkpointing():
        is_on = bool(arguments.activation_checkpointing or arguments.gradient_checkpointing)
        arguments.activation_checkpointing = arguments.gradient_checkpointing = is_on
        arguments.activation_checkpointing_kwargs = arguments.gradient_checkpointing_kwargs


def set_adapter_to_infer(model: Any, adapter_name: str) -> None:
    """Activate an adapter of a `PeftModel` without gradients: PEFT before 0.19 has no `inference_mode` argument."""
    if "inference_mode" in inspect.signature(model.set_adapter).parameters:
        model.set_adapter(adapter_name, inference_mode=True)
    else:
        model.set_adapter(adapter_name)
        model.requires_grad_(False)


def cache_argument(model: nn.Module) -> str | None:
    """Name of the cache argument of a model's `forward`: `cache` since Transformers 5.24; None if it has none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


@functools.cache
def generation_reads_cache_keyword() -> bool:
    """Whether PEFT's generation with virtual tokens reads the key-value cache if the model's argument is named `cache`.

    PEFT 0.21 reads `past_key_values` only.
    """
    from peft import PeftModelForCausalLM

    try:
        return '"cache"' in inspect.getsource(PeftModelForCausalLM.prepare_inputs_for_generation)
    except OSError:  # a program without sources
        return False


def has_load_hook(tuner: type[nn.Module]) -> bool:
    """Whether PEFT lets a method rename an adapter's tensors before loading, and saves trained biases of any method.

    PEFT does both since version 0.21.
    """
    return hasattr(tuner, "_remap_adapter_state_dict_for_load")


def ties_saved_modules(tuner: type[nn.Module]) -> bool:
    """Whether PEFT lets a method tie weights that `modules_to_save` trains: since PEFT 0.19."""
    return hasattr(tuner, "_add_modules_to_save_to_tie")

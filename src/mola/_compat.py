"""What older versions of the libraries lack. Each entry names the first version that needs it no more."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def gguf_arguments(file: str) -> dict[str, Any]:
    """For `from_pretrained` to unpack a GGUF file while it loads; before Transformers 5.17 without being asked."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"gguf_file": file} | ({"quantization_config": config(gguf_file=file, dequantize=True)} if config else {})


def own_tokenizers() -> dict[str, Any]:
    """For `AutoTokenizer`: Transformers' own tokenizers, also where mistral-common is installed.

    Transformers before 5.16 may have no such switch.
    """
    from transformers.models.auto import tokenization_auto

    return {"mistral_format": False} if hasattr(tokenization_auto, "_use_mistral_format") else {}


def has_activation_checkpointing() -> bool:
    """Whether `TrainingArguments` names it so: since Transformers 5.21, before it was `gradient_checkpointing`."""
    from transformers import TrainingArguments

    return hasattr(TrainingArguments, "activation_checkpointing_kwargs")


def share_checkpointing(arguments: Any) -> None:
    """Give both names of activation checkpointing one value, and those of its settings; see above."""
    if not has_activation_checkpointing():
        is_on = bool(arguments.activation_checkpointing or arguments.gradient_checkpointing)
        arguments.activation_checkpointing = arguments.gradient_checkpointing = is_on
        arguments.activation_checkpointing_kwargs = arguments.gradient_checkpointing_kwargs


def set_adapter_to_infer(model: Any, adapter_name: str) -> None:
    """Make an adapter of a `PeftModel` the active one, without gradients: PEFT has a word for it since 0.19."""
    if "inference_mode" in inspect.signature(model.set_adapter).parameters:
        model.set_adapter(adapter_name, inference_mode=True)
    else:
        model.set_adapter(adapter_name)
        model.requires_grad_(False)


def cache_argument(model: nn.Module) -> str | None:
    """What a model's `forward` calls the cache: `cache` since Transformers 5.24; None if it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


@functools.cache
def generation_finds_cache() -> bool:
    """Whether PEFT's generation with virtual tokens knows the name `cache`; not yet in 0.21."""
    from peft import PeftModelForCausalLM

    try:
        return '"cache"' in inspect.getsource(PeftModelForCausalLM.prepare_inputs_for_generation)
    except OSError:  # a program without sources
        return False


def asks_before_loading(tuner: type[nn.Module]) -> bool:
    """Whether PEFT lets a method look at an adapter's tensors before it loads them, and saves trained biases of
    methods that it does not know: both since 0.21."""
    return hasattr(tuner, "_remap_adapter_state_dict_for_load")


def ties_saved_modules(tuner: type[nn.Module]) -> bool:
    """Whether PEFT lets a method tie what `modules_to_save` trains: since 0.19."""
    return hasattr(tuner, "_add_modules_to_save_to_tie")

"""A quantised base model: how it is loaded, made ready for training, and described in a record."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from mola._compat import gguf_arguments
from mola.errors import MolaError
from mola.models.devices import DTYPES
from mola.models.quantization import Quantization, method_of, stored_quantization

logger = logging.getLogger(__name__)


def loading_arguments(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` of Transformers; empty for a base that is loaded as it is.

    Args:
        quantization: checked options.
        dtype: of the base, in which 4-bit layers compute unless told otherwise.
    """
    if quantization.gguf_file is not None:
        # Unpacked: packed GGUF weights are slow to train on and cannot be saved.
        return gguf_arguments(quantization.gguf_file)
    if quantization.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if not quantization.load_in_4bit:
        return {}
    compute = quantization.bnb_4bit_compute_dtype
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type or "nf4",
            bnb_4bit_compute_dtype=dtype if compute is None else DTYPES[compute],
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        )
    }


def packed_names(model: Any) -> list[str]:
    """Names of the linears that bitsandbytes packs: all but the head, without those of a class of their own."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head]


def check_packable(model: Any, base_model: str, modules_to_save: Iterable[str] = ()) -> None:
    """Check what quantising would do to a model; weights are not read, so it may be on the meta device.

    Args:
        model: the unquantised model.
        base_model: its name, for messages.
        modules_to_save: names of modules to train in full.

    Raises:
        MolaError: there is nothing to quantise, or a module to train in full would be quantised.
    """
    names = packed_names(model)
    if not names:
        raise MolaError(
            f"`base_model` {base_model!r} cannot be quantised: all linears of its {type(model).__name__} are of a "
            "class of their own, which Transformers leaves as they are. Load it without."
        )
    for wanted in modules_to_save:
        if any(f".{name}".endswith(f".{wanted}") for name in names):
            raise MolaError(
                f"`modules_to_save` {wanted!r} cannot be trained in full: its weights are quantised. Leave it out, or "
                "pass unquantised weights without `load_in_8bit` and `load_in_4bit`."
            )


def finish_loading(model: Any) -> None:
    """Settle what bitsandbytes would do wrong or say too often; nothing for other models.

    Args:
        model: as it was loaded.
    """
    if getattr(model, "is_quantized", False):
        size = weight_bytes(model) / 2**20
        logger.info("The base has %s parameters in %.1f MiB.", f"{model.num_parameters():,}", size)
    for layer in _layers_of_4bits(model):
        if not _may_repack(layer):
            layer.support_avx512bf16_for_cpu = False
    if getattr(model, "is_loaded_in_8bit", False):
        logger.info("8-bit layers round their input to float16 (bitsandbytes).")
        noisy = logging.getLogger("bitsandbytes.autograd._functions")
        if _once_is_enough not in noisy.filters:
            noisy.addFilter(_once_is_enough)


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights, with the scales of packed ones, which Transformers' own count leaves out.

    Args:
        model: any model of Transformers, before adapters are added.
    """
    total = model.get_memory_footprint()
    for layer in _layers_of_4bits(model):
        state = layer.weight.quant_state
        scales = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
        total += sum(scale.nbytes for scale in scales)
    for module in model.modules() if getattr(model, "is_loaded_in_8bit", False) else ():
        scale = getattr(getattr(module, "weight", None), "SCB", None)
        total += 0 if scale is None else scale.nbytes
    return total


def _once_is_enough(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")  # at every product


def _may_repack(layer: Any) -> bool:
    """Whether bitsandbytes may repack a weight for its CPU kernel: it computes in bfloat16, on whole blocks only."""
    block = layer.weight.quant_state.blocksize
    fits = layer.in_features % block == 0 and layer.out_features % 32 == 0
    return fits and layer.compute_dtype == torch.bfloat16


def _layers_of_4bits(model: nn.Module) -> Iterator[Any]:
    if getattr(model, "is_loaded_in_4bit", False):
        from bitsandbytes.nn import Linear4bit

        yield from (module for module in model.modules() if isinstance(module, Linear4bit))


def keep_gradients(model: Any) -> None:
    """Let gradients through 4-bit weights: on CPUs with bfloat16 instructions bitsandbytes would repack them, without.

    Args:
        model: as it was loaded, before the first forward pass; of others than 4-bit models nothing is changed.

    Raises:
        MolaError: its weights were repacked already.
    """
    for layer in _layers_of_4bits(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise MolaError(
                "The model's 4-bit weights were repacked for inference and let no gradient through. Load it again."
            )
        layer.support_avx512bf16_for_cpu = False


def prepare_for_training(model: Any, checkpointing: bool = False, checkpointing_kwargs: Any = None) -> Any:
    """Make a quantised base ready for new adapters; other models come back as they are.

    As PEFT's `prepare_model_for_kbit_training`: the base is frozen, norms, embeddings and head become float32. Experts
    of a base model's own that are stacked in one parameter, which nothing packs, keep their dtype: in float32 they
    would take more memory than the unquantised model. `keep_gradients` is done.

    Args:
        model: base model, before adapters are added.
        checkpointing: whether activations are recomputed.
        checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`.

    Returns:
        The same model.

    Raises:
        MolaError: its weights were repacked already.
    """
    if not getattr(model, "is_quantized", False):
        return model
    keep_gradients(model)
    with _without_stacks(model):
        prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=checkpointing_kwargs
        )
    logger.info("Ready for training, the base takes %.1f MiB.", weight_bytes(model) / 2**20)
    return model


@contextmanager
def _without_stacks(model: nn.Module) -> Iterator[None]:
    """Take parameters of 16 bits that hold a base model's own experts out for the block; they come back frozen."""
    taken = [
        (module, name, parameter)
        for module in model.modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and parameter.dtype in (torch.float16, torch.bfloat16)
    ]
    for module, name, _ in taken:
        del module._parameters[name]
    try:
        yield
    finally:
        for module, name, parameter in taken:
            parameter.requires_grad = False
            module.register_parameter(name, parameter)


def quantization_record(
    config: PretrainedConfig, quantization: Quantization, dtype: torch.dtype
) -> dict[str, Any] | None:
    """How the base is stored, for a run's record; None for plain weights.

    Args:
        config: the base model's configuration.
        quantization: what was asked for.
        dtype: of the base.
    """
    if quantization.gguf_file is not None:
        return {"quant_method": "gguf", "gguf_file": quantization.gguf_file, "dequantize": True}
    arguments = loading_arguments(quantization, dtype)
    stored = arguments["quantization_config"].to_dict() if arguments else stored_quantization(config)
    if stored is None:
        return None
    if method_of(stored) != "bitsandbytes":
        return {"quant_method": method_of(stored)}
    names = ["load_in_8bit"] if stored.get("load_in_8bit") else [n for n in stored if n.startswith("bnb_4bit")]
    return {"quant_method": "bitsandbytes", **{name: stored[name] for name in sorted(names)}}

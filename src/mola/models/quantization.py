"""Loads quantised base models: weights packed in 8 or 4 bits by bitsandbytes, and GGUF files, which are unpacked.

- The options of a command inherit from `Quantization`.
- `check_quantization` needs no model, `check_quantized_base` needs the model's configuration. Both run before weights
  are loaded.
- Experts and routers are never quantised. The layers of the base model are called unchanged.
"""

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
from transformers.quantizers.auto import AutoHfQuantizer

from mola._compat import gguf_arguments
from mola.errors import MolaError
from mola.models.devices import DTYPES
from mola.models.options import QUANTIZATION_OPTIONS, Quantization

logger = logging.getLogger(__name__)


def check_quantization(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Check the options alone; `dtype` is the base model's dtype.

    Raises:
        MolaError: options contradict each other or would be ignored, or bitsandbytes cannot run on this machine.
    """
    if quantization.load_in_8bit and quantization.load_in_4bit:
        raise MolaError("`load_in_8bit` and `load_in_4bit` exclude each other: got both. Leave one out.")
    if quantization.gguf_file is not None and quantization.quantizes_on_loading:
        raise MolaError(
            f"`gguf_file` ({quantization.gguf_file!r}) is unpacked while it loads and cannot be combined with "
            f"`{quantization.asked}`. Load it once, write it with save_pretrained, and pass that folder."
        )
    given = [name for name in QUANTIZATION_OPTIONS if name.startswith("bnb_4bit") and getattr(quantization, name)]
    if given and not quantization.load_in_4bit:
        raise MolaError(
            f"`{given[0]}` ({getattr(quantization, given[0])}) has no effect without `load_in_4bit`. Pass "
            "--load_in_4bit as well, or leave it out."
        )
    for name, allowed in (("bnb_4bit_quant_type", ("nf4", "fp4")), ("bnb_4bit_compute_dtype", DTYPES)):
        value = getattr(quantization, name)
        if value is not None and value not in allowed:
            raise MolaError(f"`{name}` must be one of {', '.join(allowed)}: got {value!r}.")
    if quantization.bnb_4bit_compute_dtype == "float16" and dtype == torch.bfloat16:
        raise MolaError(
            "`bnb_4bit_compute_dtype` float16 cannot hold the range of a bfloat16 base: large values would become "
            "infinite. Pass --bnb_4bit_compute_dtype bfloat16, or --dtype float16."
        )
    if quantization.quantizes_on_loading:
        _check_environment(f"`{quantization.asked}`", {quantization.asked: True}, device)


def check_mixed_precision(quantization: Quantization, mixed: torch.dtype | None) -> None:
    """Check that the dtype of mixed precision, if any, is the compute dtype: autocast also acts inside 4-bit layers."""
    compute = quantization.bnb_4bit_compute_dtype
    if compute is not None and mixed is not None and DTYPES[compute] != mixed:
        name = str(mixed).removeprefix("torch.")
        raise MolaError(
            f"`bnb_4bit_compute_dtype` {compute} would have no effect: 4-bit layers follow the mixed precision of "
            f"{name}. Pass --bnb_4bit_compute_dtype {name} or leave it out, or pass --dtype float32."
        )


def stored_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantisation of a model's files, from its `config.json`; None for plain weights."""
    stored = getattr(config, "quantization_config", None)
    return None if stored is None else dict(stored if isinstance(stored, dict) else stored.to_dict())


def check_quantized_base(
    base_model: str, config: PretrainedConfig, quantization: Quantization, device: torch.device, training: bool = False
) -> None:
    """Check a base model whose files are quantised; a model with plain weights passes.

    Raises:
        MolaError: the base would be quantised twice, a package is missing, or the method cannot run or be trained here.
    """
    stored = stored_quantization(config)
    if stored is None:
        return
    method = _method_of(stored)
    if quantization.quantizes_on_loading:
        raise MolaError(
            f"`{quantization.asked}` cannot quantise {base_model!r} again: its files are quantised already ({method}). "
            f"Leave `{quantization.asked}` and its options out."
        )
    quantizer = _check_environment(f"`base_model` {base_model!r}, quantised with {method},", stored, device)
    if training and not quantizer.is_trainable:
        raise MolaError(
            f"`base_model` {base_model!r} is quantised with {method}, which Transformers cannot train through. "
            "Pass unquantised weights, with --load_in_4bit or --load_in_8bit for less memory."
        )
    if method != "bitsandbytes":
        logger.warning("mola was not tested on base models quantised with %s.", method)


def _check_environment(what: str, settings: dict[str, Any], device: torch.device) -> Any:
    """Return Transformers' quantizer for these settings; raise if the quantizer cannot run on this machine."""
    try:
        quantizer = AutoHfQuantizer.from_config(dict(settings), pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, dtype=None)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        install = ""
        if isinstance(error, ImportError) and _method_of(settings) == "bitsandbytes":
            install = " Run `pip install 'mola-peft[quant]'`."
        raise MolaError(f"{what} cannot be loaded here: {' '.join(str(error).split())}{install}") from error
    return quantizer


def _method_of(stored: dict[str, Any]) -> str:
    method = stored.get("quant_method", "bitsandbytes")
    return str(getattr(method, "value", method))


def loading_arguments(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` of Transformers; empty for a base that is loaded as it is.

    `dtype` is the base model's dtype; 4-bit layers compute in this dtype by default.
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


def check_packable(model: Any, base_model: str, modules_to_save: Iterable[str] = ()) -> None:
    """Check that quantising packs some linears, and none that is to be trained; the model may be on the meta device.

    Raises:
        MolaError: there is nothing to quantise, or a module of `modules_to_save` would be quantised.
    """
    # bitsandbytes packs all linears but the head, and no linear whose class is the model's own.
    head = model.get_output_embeddings()
    names = [name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head]
    if not names:
        raise MolaError(
            f"`base_model` {base_model!r} cannot be quantised: Transformers packs no linear of a "
            f"{type(model).__name__}. Load it without quantisation."
        )
    for wanted in modules_to_save:
        if any(f".{name}".endswith(f".{wanted}") for name in names):
            raise MolaError(
                f"`modules_to_save` {wanted!r} cannot be trained in full: its weights are quantised. Leave it out, or "
                "pass unquantised weights without `load_in_8bit` and `load_in_4bit`."
            )


def finish_loading(model: Any) -> None:
    """Keep bitsandbytes from repacking weights wrongly, and log how a quantised model is stored."""
    if getattr(model, "is_quantized", False):
        size = weight_bytes(model) / 2**20
        logger.info("The base has %s parameters in %.1f MiB.", f"{model.num_parameters():,}", size)
    for layer in _layers_of_4bits(model):
        # The CPU kernel, for which bitsandbytes repacks a weight, needs whole blocks and bfloat16.
        block = layer.weight.quant_state.blocksize
        fits = layer.in_features % block == 0 and layer.out_features % 32 == 0
        if not fits or layer.compute_dtype != torch.bfloat16:
            layer.support_avx512bf16_for_cpu = False
    if getattr(model, "is_loaded_in_8bit", False):
        logger.info("8-bit layers round their input to float16 (bitsandbytes).")
        # bitsandbytes logs this at every product.
        noisy = logging.getLogger("bitsandbytes.autograd._functions")
        if _is_no_cast_message not in noisy.filters:
            noisy.addFilter(_is_no_cast_message)


def _is_no_cast_message(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _layers_of_4bits(model: nn.Module) -> Iterator[Any]:
    if getattr(model, "is_loaded_in_4bit", False):
        from bitsandbytes.nn import Linear4bit

        yield from (module for module in model.modules() if isinstance(module, Linear4bit))


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights, with the scales of packed weights, which Transformers does not count."""
    total = model.get_memory_footprint()
    for layer in _layers_of_4bits(model):
        state = layer.weight.quant_state
        scales = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
        total += sum(scale.nbytes for scale in scales)
    for module in model.modules() if getattr(model, "is_loaded_in_8bit", False) else ():
        scale = getattr(getattr(module, "weight", None), "SCB", None)
        total += 0 if scale is None else scale.nbytes
    return total


def prepare_for_training(model: Any, checkpointing: bool = False, checkpointing_kwargs: Any = None) -> Any:
    """Make a quantised base ready for new adapters; other models are returned unchanged.

    Like PEFT's `prepare_model_for_kbit_training`: the base is frozen; norms, embeddings and head become float32.
    A base model's own experts that are stacked in one parameter are not packed and keep their dtype: in float32 they
    would take more memory than the unquantised model.

    It must run before adapters are added and before the first forward pass. With `checkpointing` activations are
    computed again in the backward pass, by `torch.utils.checkpoint.checkpoint` with `checkpointing_kwargs`.

    Raises:
        MolaError: the model's weights were already repacked for inference.
    """
    if not getattr(model, "is_quantized", False):
        return model
    # On CPUs with bfloat16 instructions bitsandbytes repacks 4-bit weights; repacked weights pass no gradient on.
    for layer in _layers_of_4bits(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise MolaError(
                "The model's 4-bit weights were repacked for inference and pass no gradient on. Load the model again."
            )
        layer.support_avx512bf16_for_cpu = False
    with _without_stacked_experts(model):
        prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=checkpointing_kwargs
        )
    logger.info("Ready for training, the base takes %.1f MiB.", weight_bytes(model) / 2**20)
    return model


@contextmanager
def _without_stacked_experts(model: nn.Module) -> Iterator[None]:
    """Hide the 16-bit parameters that stack the base model's own experts during the block; they come back frozen."""
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
    """Describe how the base is stored, for a run's record; None for plain weights."""
    if quantization.gguf_file is not None:
        return {"quant_method": "gguf", "gguf_file": quantization.gguf_file, "dequantize": True}
    arguments = loading_arguments(quantization, dtype)
    stored = arguments["quantization_config"].to_dict() if arguments else stored_quantization(config)
    if stored is None:
        return None
    if _method_of(stored) != "bitsandbytes":
        return {"quant_method": _method_of(stored)}
    names = ["load_in_8bit"] if stored.get("load_in_8bit") else [n for n in stored if n.startswith("bnb_4bit")]
    return {"quant_method": "bitsandbytes", **{name: stored[name] for name in sorted(names)}}

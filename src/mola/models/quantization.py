"""Quantised base models: weights packed in 8 or 4 bits, and GGUF files, which are unpacked.

- A command's options inherit those of `Quantization`.
- `check_quantization` needs no model, `check_quantized_base` its configuration: both run before weights load.
- Experts and routers are never quantised; the base layers are called as they are.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import is_bitsandbytes_available

from mola.errors import MolaError
from mola.models.devices import DTYPES
from mola.options.fields import Group, option

logger = logging.getLogger(__name__)

_QUANT_TYPES = ("nf4", "fp4")
# Other methods are called as they are, with a warning.
_TESTED = ("bitsandbytes",)
_INSTALL = "Run `pip install 'mola-peft[{extra}]'`."

GGUF_HELP = "GGUF file in the folder `base_model`, unpacked while it loads."


@dataclass(kw_only=True)
class Quantization:
    """How the base model's weights are stored; the defaults leave it as it is. Options of a command inherit from it."""

    _base: ClassVar = Group("base model")
    load_in_8bit: bool = option(False, "Quantise the base to 8 bits while it loads (bitsandbytes).")
    load_in_4bit: bool = option(False, "Quantise the base to 4 bits while it loads (bitsandbytes).")
    bnb_4bit_quant_type: str | None = option(None, "4-bit format: nf4 (default) or fp4.")
    bnb_4bit_compute_dtype: str | None = option(None, "dtype in which 4-bit layers compute. Default: the base's.")
    bnb_4bit_use_double_quant: bool = option(False, "Quantise the scales of the 4-bit weights as well.")
    gguf_file: str | None = option(None, GGUF_HELP)

    @property
    def on_loading(self) -> bool:
        """Whether weights are quantised while they load."""
        return self.load_in_8bit or self.load_in_4bit

    @property
    def asked(self) -> str:
        """The option that quantises them, where one does."""
        return "load_in_8bit" if self.load_in_8bit else "load_in_4bit"


QUANTIZATION_OPTIONS = tuple(item.name for item in fields(Quantization))


def check_quantization(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse options that contradict each other, or that cannot be done on this machine.

    Args:
        quantization: what was asked for.
        device: where the model will run.
        dtype: of the base.

    Raises:
        MolaError: contradictions, unknown names, a missing package, or a device without support.
    """
    if quantization.load_in_8bit and quantization.load_in_4bit:
        raise MolaError("`load_in_8bit` and `load_in_4bit` exclude each other: got both. Leave one out.")
    if quantization.gguf_file is not None:
        if quantization.on_loading:
            raise MolaError(
                f"`gguf_file` ({quantization.gguf_file!r}) is unpacked while it loads and cannot be combined with "
                f"`{quantization.asked}`. Load it once, write it with save_pretrained, and pass that folder with "
                f"`{quantization.asked}`."
            )
        if importlib.util.find_spec("gguf") is None:
            raise MolaError(f"`gguf_file` needs the package gguf, which is missing. {_INSTALL.format(extra='gguf')}")
    _check_4bit_options(quantization, dtype)
    if quantization.on_loading:
        _check_bitsandbytes(quantization.asked, device)


def _check_4bit_options(quantization: Quantization, dtype: torch.dtype) -> None:
    given = [name for name in QUANTIZATION_OPTIONS if name.startswith("bnb_4bit") and getattr(quantization, name)]
    if given and not quantization.load_in_4bit:
        name, value = given[0], getattr(quantization, given[0])
        raise MolaError(f"`{name}` ({value}) counts only with `load_in_4bit`. Pass --load_in_4bit as well, or drop it.")
    quant_type = quantization.bnb_4bit_quant_type
    if quant_type is not None and quant_type not in _QUANT_TYPES:
        raise MolaError(f"`bnb_4bit_quant_type` must be one of {', '.join(_QUANT_TYPES)}: got {quant_type!r}.")
    compute = quantization.bnb_4bit_compute_dtype
    if compute is not None and compute not in DTYPES:
        raise MolaError(f"`bnb_4bit_compute_dtype` must be one of {', '.join(DTYPES)}: got {compute!r}.")
    if compute == "float16" and dtype == torch.bfloat16:
        raise MolaError(
            "`bnb_4bit_compute_dtype` float16 cannot hold the range of a bfloat16 base: large values would become "
            "infinite. Pass --bnb_4bit_compute_dtype bfloat16, or --dtype float16."
        )


def check_mixed_precision(quantization: Quantization, mixed: torch.dtype | None) -> None:
    """Refuse a compute dtype that mixed precision would override: torch.autocast also acts inside 4-bit layers.

    Args:
        quantization: what was asked for.
        mixed: the dtype of mixed precision, None without.

    Raises:
        MolaError: the two differ.
    """
    compute = quantization.bnb_4bit_compute_dtype
    if compute is not None and mixed is not None and DTYPES[compute] != mixed:
        name = str(mixed).removeprefix("torch.")
        raise MolaError(
            f"`bnb_4bit_compute_dtype` {compute} would have no effect: training runs in mixed precision of {name}, "
            f"which 4-bit layers follow. Pass --bnb_4bit_compute_dtype {name} or leave it out, or pass --dtype float32."
        )


def _check_bitsandbytes(asked: str, device: torch.device) -> None:
    if importlib.util.find_spec("bitsandbytes") is None or not is_bitsandbytes_available():
        raise MolaError(
            f"`{asked}` needs the package bitsandbytes, which is missing or too old. {_INSTALL.format(extra='quant')}"
        )
    import bitsandbytes

    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device.type not in supported:
        raise MolaError(
            f"`{asked}` is not supported on the device {device.type!r}: bitsandbytes {bitsandbytes.__version__} "
            f"computes on {', '.join(sorted(supported))}. Choose one of these, or leave `{asked}` out."
        )


def stored_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantisation that a model's files already have, from its `config.json`; None for plain weights."""
    stored = getattr(config, "quantization_config", None)
    return None if stored is None else dict(stored if isinstance(stored, dict) else stored.to_dict())


def check_quantized_base(
    base_model: str, config: PretrainedConfig, quantization: Quantization, device: torch.device, training: bool = False
) -> None:
    """Check a base model whose files are quantised already: it needs no option, and its packages.

    Args:
        base_model: its name, for messages.
        config: its configuration.
        quantization: what was asked for.
        device: where it will run.
        training: whether experts are trained on it.

    Raises:
        MolaError: quantised twice, a package is missing, or the method cannot run or be trained here.
    """
    stored = stored_quantization(config)
    if stored is None:
        return
    method = method_of(stored)
    if quantization.on_loading:
        raise MolaError(
            f"`{quantization.asked}` cannot quantise {base_model!r} again: its files are quantised already ({method}). "
            f"Leave `{quantization.asked}` and its options out."
        )
    if method == "bitsandbytes":
        _check_bitsandbytes("base_model", device)
    try:
        quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, dtype=None)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        raise MolaError(
            f"`base_model` {base_model!r} is quantised with {method}, which cannot be loaded here: "
            f"{' '.join(str(error).split())}"
        ) from error
    if training and not quantizer.is_trainable:
        raise MolaError(
            f"`base_model` {base_model!r} is quantised with {method}, through which Transformers allows no training. "
            "Pass unquantised weights, with --load_in_4bit or --load_in_8bit for less memory."
        )
    if method not in _TESTED:
        logger.warning("mola was not tested on bases quantised with %s; its layers are called as they are.", method)


def method_of(stored: dict[str, Any]) -> str:
    """Name of the method in a `quantization_config`."""
    method = stored.get("quant_method", "bitsandbytes")
    return str(getattr(method, "value", method))

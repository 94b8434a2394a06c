"""Loading what a command needs: device, dtype, tokenizer, base model, adapters.

- Everything that can be checked without weights is checked first (`check_base_model`, `check_adapter`).
- Adapters of any PEFT method load, not only ours; one that does not fit the model is an error.
- Routers are kept in float32 on any base: in bfloat16 a few tokens would pick other experts.
"""

import itertools
import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import mola.tuner  # noqa: F401  (registers the method with PEFT)
from mola.checkpoints.formats import conversion_hint
from mola.devices import resolve_device, resolve_dtype
from mola.errors import MolaError
from mola.gguf import check_gguf_file, tokenizer_arguments
from mola.quantization import Quantization, check_quantization, check_quantized_base, stored_quantization
from mola.quantized_model import check_packable, finish_loading, loading_arguments
from mola.skeleton import model_on_meta, read_config

__all__ = [
    "check_adapter",
    "check_base_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
]

logger = logging.getLogger(__name__)

_pad_tokens_reported: set[tuple[str, str]] = set()


def check_base_model(base_model: str | os.PathLike[str], gguf_file: str | None = None) -> None:
    """Refuse a base model that cannot load, before anything heavy happens; a hub id is let through.

    Args:
        base_model: folder or hub id.
        gguf_file: GGUF file in that folder, which holds everything; None for a folder with `config.json`.

    Raises:
        MolaError: a folder without `config.json` or without the GGUF file, a file, or a path that does not exist.
    """
    name = os.fspath(base_model)
    if not name.strip():
        raise MolaError("`base_model` must name a model: got an empty text. Pass a folder or a hub id.")
    path = Path(name)
    if path.is_dir():
        check_gguf_file(path, gguf_file)
        if gguf_file is not None or (path / "config.json").is_file():
            return
        if (path / "adapter_config.json").is_file():
            raise MolaError(
                f"`base_model` must hold a whole model: folder {name!r} has no config.json but "
                "an adapter. Pass it as `adapter` and its base model as `base_model`."
            )
        raise MolaError(
            f"`base_model` must hold a model: folder {name!r} has no config.json. "
            "Pass a folder written by save_pretrained or a hub id."
        )
    if path.exists():
        raise MolaError(f"`base_model` must be a folder or a hub id: {name!r} is a file. Pass its folder.")
    # A hub id is `name` or `owner/name`; anything else can only have been meant as a path.
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise MolaError(f"`base_model` names a folder that does not exist: {name!r}. Check the path.")


def check_adapter(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the configuration of an adapter folder.

    Returns:
        The content of its `adapter_config.json`.

    Raises:
        MolaError: no such folder, its `adapter_config.json` or weights are missing or unreadable, or it is in a
            format that `mola convert` has to translate first.
    """
    folder = Path(adapter)
    path = folder / "adapter_config.json"
    if not path.is_file():
        missing = "no adapter_config.json in it" if folder.is_dir() else "no such folder"
        raise MolaError(
            f"`adapter` must be a folder that holds an adapter: {str(folder)!r}, {missing}. "
            "Pass the folder that training or `mola convert` wrote."
        )
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise MolaError(
            f"`adapter` has no weights: neither adapter_model.safetensors nor adapter_model.bin is in "
            f"{str(folder)!r}. Was the training interrupted before it saved?"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MolaError(f"`adapter` has a broken configuration: {path} is no JSON ({error}).") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise MolaError(f"`adapter` has a broken configuration: {path} has no `peft_type`.")
    hint = conversion_hint(config, str(folder))
    if hint:
        raise MolaError(f"`adapter` must be in PEFT's format: {hint}")
    return config


def load_config(
    base_model: str | os.PathLike[str], trust_remote_code: bool = False, gguf_file: str | None = None
) -> PretrainedConfig:
    """Configuration of the base model; loads no weights.

    Args:
        base_model: folder or hub id.
        trust_remote_code: run code shipped with the model.
        gguf_file: GGUF file in that folder, if it is one.

    Raises:
        MolaError: see `check_base_model`; also when the configuration is broken or the hub does not have it.
    """
    check_base_model(base_model, gguf_file)
    return read_config(os.fspath(base_model), trust_remote_code, gguf_file)


def load_tokenizer(
    base_model: str | os.PathLike[str],
    padding_side: str = "left",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase:
    """Tokenizer of the base model with a padding token; the vocabulary never grows.

    Without a padding token of its own it pads with the unknown or, failing that, the end token (padded
    positions are masked, so the choice does not change a result).

    Args:
        base_model: folder or hub id.
        padding_side: `"left"` for generation, `"right"` for training.
        trust_remote_code: run code shipped with the model.
        gguf_file: GGUF file in that folder; its tokenizer is used only where the folder has no other.

    Returns:
        The tokenizer.

    Raises:
        MolaError: see `check_base_model`; no tokenizer there, or no token that could pad.
    """
    check_base_model(base_model, gguf_file)
    name = os.fspath(base_model)
    if padding_side not in ("left", "right"):
        raise MolaError(f"`padding_side` must be 'left' or 'right': got {padding_side!r}.")
    arguments = tokenizer_arguments(name, gguf_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, padding_side=padding_side, trust_remote_code=trust_remote_code, **arguments
        )
    except (OSError, ValueError, KeyError) as error:
        raise MolaError(f"`base_model` has no tokenizer that loads: {name!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.unk_token if tokenizer.unk_token is not None else tokenizer.eos_token
        if substitute is None:
            raise MolaError(
                f"`base_model` has a tokenizer without padding, unknown or end token: {name!r}. "
                "Set `pad_token` in its tokenizer_config.json to an existing token."
            )
        tokenizer.pad_token = substitute
        if (name, substitute) not in _pad_tokens_reported:
            _pad_tokens_reported.add((name, substitute))
            logger.warning("The tokenizer of %s has no padding token; padding with %r.", name, substitute)
    return tokenizer


def load_model(
    base_model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel | PeftModel:
    """Base model with its adapters, ready for inference (eval mode, on its device, all weights frozen).

    Args:
        base_model: folder or hub id.
        adapter: an adapter folder, or several as name -> folder (the first is active); None for none.
        dtype: see `resolve_dtype`; adapters take the dtype of the base, routers stay float32. On quantised layers
            adapters stay as they were saved.
        device: see `resolve_device`.
        trust_remote_code: run code shipped with the model.
        attn_implementation: as in Transformers (`"eager"`, `"sdpa"`, ...); None for its default.
        quantization: how to quantise the base; None loads it as it is, which may be quantised already.

    Returns:
        The model; a `PeftModel` when an adapter was given.

    Raises:
        MolaError: model or adapter missing, broken, or not made for each other.
    """
    adapters = _as_mapping(adapter)
    configs = {name: check_adapter(folder) for name, folder in adapters.items()}
    target = resolve_device(device)
    torch_dtype, reason = resolve_dtype(dtype, target)
    quantization = quantization or Quantization()
    check_quantization(quantization, target, torch_dtype)
    config = load_config(base_model, trust_remote_code, quantization.gguf_file)
    check_quantized_base(os.fspath(base_model), config, quantization, target)
    logger.info("Loading %s on %s, %s.", os.fspath(base_model), target, reason)
    arguments: dict[str, Any] = {"dtype": torch_dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    arguments |= loading_arguments(quantization, torch_dtype)
    if quantization.on_loading:
        check_packable(model_on_meta(os.fspath(base_model), trust_remote_code), os.fspath(base_model))
    is_quantized = quantization.on_loading or stored_quantization(config) is not None
    if is_quantized:  # packed weights are placed while loading and cannot be moved afterwards
        arguments["device_map"] = {"": target}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(os.fspath(base_model), config=config, **arguments)
    except OSError as error:
        raise MolaError(f"`base_model` cannot be loaded: {os.fspath(base_model)!r}: {error}") from error
    if not is_quantized:
        model = model.to(target)
    finish_loading(model)
    for name, folder in adapters.items():
        _warn_other_base(base_model, folder, configs[name])
        model = _attach(model, name, os.fspath(folder))
    return model.requires_grad_(False).eval()


def _as_mapping(
    adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
) -> dict[str, str | os.PathLike[str]]:
    if adapter is None:
        return {}
    if not isinstance(adapter, Mapping):
        return {"default": adapter}
    for name in adapter:
        if not name or "." in name:
            raise MolaError(f"`adapter` needs names without dots, not empty: got {name!r}. Pass another name.")
    return dict(adapter)


def _warn_other_base(
    base_model: str | os.PathLike[str], folder: str | os.PathLike[str], config: Mapping[str, Any]
) -> None:
    recorded = config.get("base_model_name_or_path")
    # Folders move and hub ids lose their owner: only the last part says which model it is.
    if recorded and Path(recorded).name != Path(base_model).name:
        logger.warning(
            "The adapter %s was trained on %s, `base_model` is %s: results are meaningful only if these are "
            "the same weights.",
            folder,
            recorded,
            os.fspath(base_model),
        )


def _attach(model: Any, name: str, folder: str) -> PeftModel:
    """Add one adapter and check that every one of its tensors found its place."""
    try:
        with warnings.catch_warnings():
            # Missing tensors are an error below, so PEFT's own warning would only repeat it.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            if not isinstance(model, PeftModel):
                model = PeftModel.from_pretrained(model, folder, adapter_name=name, autocast_adapter_dtype=False)
            # A first adapter once more: `from_pretrained` does not tell which tensors found no place.
            result = model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        raise MolaError(f"`adapter` does not fit the base model: {folder!r}: {error}") from error
    missing = _keys_of(name, model.peft_config[name].peft_type, result.missing_keys)
    for problem, keys in (("missing", missing), ("not used by it", result.unexpected_keys)):
        if keys:
            raise MolaError(
                f"`adapter` does not match its configuration: {folder!r} has {len(keys)} tensors {problem}, "
                f"such as {keys[0]!r}. Pass the base model it was trained on, or save the adapter again."
            )
    return model


def _keys_of(name: str, peft_type: Any, keys: list[str]) -> list[str]:
    """Keys that are one adapter's; PEFT looks for the name anywhere, so `"b"` also finds `"base_model"`."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_type, "")
    parts = [(key, key.split(".")) for key in keys]
    return [
        key
        for key, path in parts
        if any(before.startswith(prefix) and part == name for before, part in itertools.pairwise(path))
    ]

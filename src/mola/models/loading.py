"""Loading what a command needs: device, dtype, tokenizer, base model, adapters.

- Everything that can be checked without weights is checked first (`check_base_model`, `check_adapter`,
  `check_adapter_fits`).
- Routers are kept in float32 on any base: in bfloat16 a few tokens would pick other experts.
"""

import gc
import logging
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mola._compat import own_tokenizers
from mola.checkpoints.tensors import read_settings, read_tensors
from mola.errors import MolaError
from mola.models.adapters import as_mapping, attach, check_adapter, check_fits, warn_other_base
from mola.models.devices import resolve_device, resolve_dtype
from mola.models.gguf import TOKENIZER_FILES, check_gguf_file, tokenizer_arguments
from mola.models.lora_fit import check_lora
from mola.models.meta import model_on_meta, read_config
from mola.models.quantization import Quantization, check_quantization, check_quantized_base, stored_quantization
from mola.models.quantized import check_packable, finish_loading, loading_arguments
from mola.tuner import MolaConfig

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

_TOKENIZERS = (*TOKENIZER_FILES, "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
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
    if os.path.isdir(path):
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
    if os.path.exists(path):
        raise MolaError(f"`base_model` must be a folder or a hub id: {name!r} is a file. Pass its folder.")
    # A hub id is `name` or `owner/name`; anything else can only have been meant as a path.
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise MolaError(f"`base_model` names a folder that does not exist: {name!r}. Check the path.")


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


def check_adapter_fits(
    base_model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> None:
    """Whether a mixture or a LoRA fits its base model, before the weights of that are loaded; others are left to PEFT.

    Args:
        base_model: folder or hub id.
        adapter: an adapter folder.
        trust_remote_code: code shipped with the model may not work without weights, so nothing is checked then.
        gguf_file: GGUF file in the model's folder, if it is one.

    Raises:
        MolaError: another kind of model, or experts or a LoRA that do not fit it.
    """
    method = read_settings(Path(adapter))["peft_type"]
    if trust_remote_code or method not in ("MOLA", "LORA"):
        return
    on_meta = model_on_meta(os.fspath(base_model), gguf_file=gguf_file)
    if method == "LORA":
        check_lora(Path(adapter), on_meta, all_names=False)
        return
    try:
        config = MolaConfig.from_pretrained(os.fspath(adapter))
        check_fits(on_meta, config, read_tensors(Path(adapter)))
    except (MolaError, TypeError) as error:
        raise MolaError(f"`adapter` does not fit the base model: {os.fspath(adapter)!r}: {error}") from error


def own_tokenizer(
    base_model: str, trust_remote_code: bool = False, gguf_file: str | None = None, **settings: Any
) -> PreTrainedTokenizerBase:
    """Tokenizer of the base model as it is, but for the `settings`; see `load_tokenizer`, which makes it pad.

    Raises:
        MolaError: no tokenizer there.
    """
    arguments = tokenizer_arguments(base_model, gguf_file)
    folder = Path(base_model)
    # Transformers before 5.17 makes up a tokenizer that knows next to nothing.
    if folder.is_dir() and not arguments and not any(any(folder.glob(each)) for each in _TOKENIZERS):
        raise MolaError(
            f"`base_model` has no tokenizer that loads: {base_model!r} holds none of {', '.join(_TOKENIZERS)}."
        )
    try:
        arguments |= own_tokenizers()
        tokenizer = AutoTokenizer.from_pretrained(
            base_model, trust_remote_code=trust_remote_code, **arguments, **settings
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        hint, needed = "", ("sentencepiece", "google.protobuf")
        if any(folder.glob("*.model")) and not all(map(_is_installed, needed)):  # Transformers then speaks of others
            hint = " Its tokenizer.model needs: pip install 'mola-peft[sentencepiece]'"
        raise MolaError(f"`base_model` has no tokenizer that loads: {base_model!r}: {error}{hint}") from error
    if not hasattr(tokenizer, "is_fast"):
        raise MolaError(
            f"`base_model` {base_model!r} has the tokenizer of mistral-common, which does not say where in a text a "
            "token is. Update Transformers, or uninstall mistral-common."
        )
    return tokenizer


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package above
        return False


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
    tokenizer = own_tokenizer(name, trust_remote_code, gguf_file, padding_side=padding_side)
    pads, vocabulary = tokenizer.pad_token_id, _vocabulary(name, trust_remote_code, gguf_file)
    if pads is None or (vocabulary is not None and pads >= vocabulary):
        substitute = tokenizer.unk_token if tokenizer.unk_token is not None else tokenizer.eos_token
        if substitute is None:
            raise MolaError(
                f"`base_model` has a tokenizer without padding, unknown or end token: {name!r}. "
                "Set `pad_token` in its tokenizer_config.json to an existing token."
            )
        tokenizer.pad_token = substitute
        if (name, substitute) not in _pad_tokens_reported:
            _pad_tokens_reported.add((name, substitute))
            what = "no padding token" if pads is None else f"a padding token, {pads}, that the model does not know"
            logger.warning("The tokenizer of %s has %s; padding with %r.", name, what, substitute)
    return tokenizer


def _vocabulary(base_model: str, trust_remote_code: bool, gguf_file: str | None) -> int | None:
    """Tokens for which the model has embeddings, as its configuration says."""
    config: Any = read_config(base_model, trust_remote_code, gguf_file)
    return getattr(config.get_text_config(), "vocab_size", None)


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
    adapters = as_mapping(adapter)
    configs = {name: check_adapter(folder) for name, folder in adapters.items()}
    methods = {name: config["peft_type"] for name, config in configs.items()}
    if len(set(methods.values())) > 1:
        found = ", ".join(f"{name!r} is {method}" for name, method in methods.items())
        raise MolaError(f"`adapter` must be of one method: {found}. Load them into models of their own.")
    target = resolve_device(device)
    torch_dtype, reason = resolve_dtype(dtype, target)
    quantization = quantization or Quantization()
    check_quantization(quantization, target, torch_dtype)
    config = load_config(base_model, trust_remote_code, quantization.gguf_file)
    check_quantized_base(os.fspath(base_model), config, quantization, target)
    for folder in adapters.values():
        check_adapter_fits(base_model, folder, trust_remote_code, quantization.gguf_file)
    _report_own_adapter(base_model, adapters)
    logger.info("Loading %s on %s, %s.", os.fspath(base_model), target, reason)
    if target.type != "cpu":
        gc.collect()  # an earlier model and what watches it refer to each other, and would keep their memory
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
    except (OSError, ImportError) as error:  # the second of its own code
        raise MolaError(f"`base_model` cannot be loaded: {os.fspath(base_model)!r}: {error}") from error
    if not is_quantized:
        model = model.to(target)
    finish_loading(model)
    for name, folder in adapters.items():
        warn_other_base(base_model, folder, configs[name])
        model = attach(model, name, os.fspath(folder))
    if len(adapters) > 1:  # PEFT makes trained tokens of the last one the active ones, where embeddings are tied
        model.set_adapter(next(iter(adapters)))
    return model.requires_grad_(False).eval()


def _report_own_adapter(base_model: str | os.PathLike[str], adapters: Mapping[str, Any]) -> None:
    """A folder with a model and an adapter: Transformers loads both without a word."""
    if not os.path.isfile(Path(base_model) / "adapter_config.json"):
        return
    if adapters:
        raise MolaError(
            f"`adapter` cannot be added to a base model that has one already: {os.fspath(base_model)!r} holds an "
            "adapter_config.json. Pass a folder with the base model alone."
        )
    logger.warning("%s holds an adapter too, which is loaded with the base model.", os.fspath(base_model))

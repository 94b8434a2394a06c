"""A model without weights: its configuration, built on the meta device in a moment and no memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.models.gguf import check_gguf_file, read_gguf_config

_WANTED = "Pass a folder with config.json, a config.json file, or a name on the hub."


def read_config(base_model: str, trust_remote_code: bool = False, gguf_file: str | None = None) -> PretrainedConfig:
    """Configuration of a model, whatever may be wrong with it.

    Args:
        base_model: a folder with config.json, a config.json file, or a name on the hub.
        trust_remote_code: run code shipped with the model.
        gguf_file: name of a GGUF file there, which is read instead of config.json.

    Raises:
        MolaError: it is not there, broken, or of a type that Transformers does not know.
    """
    try:
        if gguf_file is not None:
            return read_gguf_config(base_model, gguf_file)
        # Explicit False: with None Transformers would ask on the terminal.
        return AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RecursionError, StrictDataclassError) as error:
        _check_own_code(base_model, error)
        raise MolaError(
            f"`base_model` has no readable configuration: {base_model!r} ({_one_line(error)}). {_WANTED}"
        ) from error


def model_on_meta(base_model: str, trust_remote_code: bool = False, gguf_file: str | None = None) -> PreTrainedModel:
    """Build a causal language model from its configuration only.

    Args:
        base_model: a folder with config.json, a config.json file, or a name on the hub.
        trust_remote_code: run code shipped with the model.
        gguf_file: as in `read_config`.

    Raises:
        MolaError: there is no readable configuration, or it is not one of a causal language model.
    """
    config = read_config(base_model if gguf_file is not None else _place(base_model), trust_remote_code, gguf_file)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        _check_own_code(base_model, error)
        raise MolaError(
            f"`base_model` must be a causal language model: {base_model!r} of type "
            f"{config.model_type!r} cannot be built as one ({_one_line(error)})."
        ) from error


def count_decoder_layers(model: PreTrainedModel, base_model: str) -> int:
    """Number of decoder layers of a model.

    Raises:
        MolaError: it has none.
    """
    num_layers = LayerStacks.of(model).num_layers
    if num_layers is None or num_layers < 1:
        raise MolaError(
            f"`base_model` must have decoder layers: found {num_layers or 'none'} in {base_model!r}. "
            "Check `num_hidden_layers` in its config.json."
        )
    return num_layers


def _place(base_model: str) -> str:
    """The folder or file behind a path; a name on the hub as it is."""
    path = Path(os.path.expanduser(base_model))
    if not os.path.exists(path):
        # A hub name has at most one slash; anything else would only wait for the network to fail.
        if base_model.startswith((".", "/", "~")) or base_model.count("/") > 1 or path.suffix == ".json":
            raise MolaError(f"`base_model` does not exist: {base_model!r}. {_WANTED}")
        return base_model
    if path.is_dir():
        check_gguf_file(path, None)
        if not (path / "config.json").is_file():
            raise MolaError(f"`base_model` is a folder without config.json: {base_model!r}. {_WANTED}")
    return str(path)


def _check_own_code(base_model: str, error: Exception) -> None:
    if "custom code" in str(error):
        raise MolaError(
            f"`base_model` {base_model!r} comes with code of its own, which would have to be run. Look at it, and pass "
            "--trust_remote_code true if you trust it."
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."

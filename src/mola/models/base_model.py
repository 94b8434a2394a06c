"""A base model before its weights: whether a folder holds one, and its configuration."""

import os
import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mola.errors import MolaError
from mola.models.gguf import check_gguf_file
from mola.models.meta import read_config


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


def max_positions(config: Any) -> int | None:
    """Longest sequence a model of this configuration takes; None when it names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def vocabulary_size(config: Any) -> int | None:
    """Tokens for which a model of this configuration has embeddings; None when it does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)

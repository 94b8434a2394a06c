"""Checks that a folder holds a base model, and reads the model's configuration, before weights are loaded."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from mola.errors import MolaError
from mola.models.gguf import check_gguf_file, read_gguf_config

_WANTED = "Pass a folder with config.json, a config.json file, or a name on the hub."


def check_base_model(base_model: str | os.PathLike[str], gguf_file: str | None = None) -> None:
    """Check that a folder holds a base model. A hub id passes.

    Args:
        base_model: folder or hub id.
        gguf_file: GGUF file in that folder, or None for a folder with `config.json`.

    Raises:
        MolaError: the path does not exist, is a file, or is a folder without `config.json` or the GGUF file.
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
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or path.suffix == ".json":
        raise MolaError(f"`base_model` names a folder that does not exist: {name!r}. Check the path.")


def read_config(base_model: str, trust_remote_code: bool = False, gguf_file: str | None = None) -> PretrainedConfig:
    """Read the configuration of a model.

    Args:
        base_model: a folder with config.json, a config.json file, or a name on the hub.
        trust_remote_code: run code shipped with the model.
        gguf_file: name of a GGUF file in that folder, which is read instead of config.json.

    Raises:
        MolaError: the configuration is missing or broken, or its type is unknown to Transformers.
    """
    try:
        if gguf_file is not None:
            return read_gguf_config(base_model, gguf_file)
        # Explicit False: with None Transformers would ask on the terminal.
        return AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RecursionError, StrictDataclassError) as error:
        check_own_code(base_model, error)
        raise MolaError(
            f"`base_model` has no readable configuration: {base_model!r} ({one_line(error)}). {_WANTED}"
        ) from error


def model_name(base_model: str | os.PathLike[str]) -> str:
    """The last part of a path or hub id, which still names the model when folders move.

    In the cache of the Hub (`models--owner--name/snapshots/<commit>`) the name comes from before the commit.
    """
    path = Path(base_model)
    is_commit = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return path.parent.parent.name.rpartition("--")[2] if is_commit else path.name


def load_config(
    base_model: str | os.PathLike[str], trust_remote_code: bool = False, gguf_file: str | None = None
) -> PretrainedConfig:
    """Check that a base model exists, and read its configuration; loads no weights.

    Args:
        base_model: folder or hub id.
        trust_remote_code: run code shipped with the model.
        gguf_file: GGUF file in that folder; None if the model is not in a GGUF file.

    Raises:
        MolaError: see `check_base_model` and `read_config`.
    """
    check_base_model(base_model, gguf_file)
    return read_config(os.fspath(base_model), trust_remote_code, gguf_file)


def max_positions(config: Any) -> int | None:
    """Maximum sequence length of a model with this configuration, or None if it has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def vocabulary_size(config: Any) -> int | None:
    """Number of tokens in the vocabulary of a model with this configuration, or None if it is unknown."""
    return getattr(config.get_text_config(), "vocab_size", None)


def check_own_code(base_model: str, error: Exception) -> None:
    """Raise a `MolaError` if `error` means that the model needs its own code, which was not run."""
    if "custom code" in str(error):
        raise MolaError(
            f"`base_model` {base_model!r} comes with code of its own, which would have to be run. Look at it, and pass "
            "--trust_remote_code true if you trust it."
        ) from error


def one_line(error: BaseException) -> str:
    """The text of an error on one line, cut to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."

"""A base model before its weights: whether a folder holds one, and its configuration."""

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
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or path.suffix == ".json":
        raise MolaError(f"`base_model` names a folder that does not exist: {name!r}. Check the path.")


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
        check_own_code(base_model, error)
        raise MolaError(
            f"`base_model` has no readable configuration: {base_model!r} ({one_line(error)}). {_WANTED}"
        ) from error


def model_name(base_model: str | os.PathLike[str]) -> str:
    """The last part of a path or Hub name, also of its folder `models--owner--name/snapshots/<commit>`.

    Folders move and hub ids lose their owner: only this part says which model it is.
    """
    path = Path(base_model)
    is_commit = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return path.parent.parent.name.rpartition("--")[2] if is_commit else path.name


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


def check_own_code(base_model: str, error: Exception) -> None:
    """Say what to do where `error` is that a model's own code was not run."""
    if "custom code" in str(error):
        raise MolaError(
            f"`base_model` {base_model!r} comes with code of its own, which would have to be run. Look at it, and pass "
            "--trust_remote_code true if you trust it."
        ) from error


def one_line(error: BaseException) -> str:
    """What an error says, without line ends and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."

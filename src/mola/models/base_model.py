"""Finds a base model, reads its configuration and identifies its weights, before the weights are loaded."""

import copy
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from mola.errors import MolaError
from mola.files.digests import file_sha256
from mola.models.base_folder import check_base_model, no_configuration

_WEIGHTS_ENDINGS = (".safetensors", ".bin", ".gguf")


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
            file = Path(base_model) / gguf_file
            changed = file.stat().st_mtime_ns if file.is_file() else None
            return copy.deepcopy(_read_gguf_config(base_model, gguf_file, changed))
        # Explicit False: with None Transformers would ask on the terminal.
        return AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RecursionError, StrictDataclassError) as error:
        check_own_code(base_model, error)
        raise no_configuration(base_model, one_line(error)) from error


@functools.lru_cache(maxsize=4)
def _read_gguf_config(base_model: str, gguf_file: str, changed: int | None) -> PretrainedConfig:
    """The configuration in a GGUF file. Reading takes seconds, so it is kept until the time `changed` differs."""
    try:
        return AutoConfig.from_pretrained(base_model, gguf_file=gguf_file)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # the reader raises many kinds of errors for damaged files
        raise ValueError(f"{gguf_file} is damaged ({type(error).__name__}: {error})") from error


def load_config(
    base_model: str | os.PathLike[str], trust_remote_code: bool = False, gguf_file: str | None = None
) -> PretrainedConfig:
    """Check that a base model exists, and read its configuration; loads no weights.

    Raises:
        MolaError: see `check_base_model` and `read_config`.
    """
    check_base_model(base_model, gguf_file)
    return read_config(os.fspath(base_model), trust_remote_code, gguf_file)


def weights_identity(base_model: str | os.PathLike[str]) -> str:
    """A text that identifies the weights of a base model; a copied or renamed folder keeps it.

    Returns:
        The sha256 of a folder's weight files, "" if there are none; for a model on the hub its name and commit.
    """
    folder = Path(base_model)
    if not folder.is_dir():
        return f"{base_model}@{extract_commit_hash(cached_file(str(base_model), CONFIG_NAME), None)}"
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS_ENDINGS and path.is_file())
    digests = {path.name: _cached_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest() if files else ""


@functools.cache
def _cached_sha256(path: Path, size: int, changed: int) -> str:
    """The sha256 of a file, read again only if its size or the time of its last change differs."""
    return file_sha256(path)


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

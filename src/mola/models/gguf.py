"""GGUF files as base models: one file that holds configuration, tokenizer and packed weights."""

from __future__ import annotations

import copy
import functools
import logging
import os
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from mola.errors import MolaError

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_gguf_file(folder: Path, gguf_file: str | None) -> None:
    """Check that the folder of a base model holds the chosen GGUF file; None means that no file was chosen.

    Raises:
        MolaError: the file does not exist, or the folder has GGUF files only and none was chosen.
    """
    names = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf_file is None and names and not (folder / "config.json").is_file():
        raise MolaError(
            f"`base_model` {str(folder)!r} has no config.json but GGUF files: {', '.join(names)}. Pass one of them as "
            f"well: --gguf_file {names[0]}. Commands without this option need a model that was saved as safetensors."
        )
    if gguf_file is None:
        return
    if not os.path.isfile(folder / gguf_file):
        found = ", ".join(names) or "none"
        raise MolaError(
            f"`gguf_file` must be a file in `base_model`: {gguf_file!r} is not in {str(folder)!r}. "
            f"GGUF files in this folder: {found}."
        )


def read_gguf_config(base_model: str, gguf_file: str) -> PretrainedConfig:
    """Configuration of the model in a GGUF file. Reading is slow, so the result is kept until the file changes."""
    file = Path(base_model) / gguf_file
    changed = file.stat().st_mtime_ns if file.is_file() else None
    return copy.deepcopy(_read_gguf_config(base_model, gguf_file, changed))


@functools.lru_cache(maxsize=4)
def _read_gguf_config(base_model: str, gguf_file: str, changed: int | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(base_model, gguf_file=gguf_file)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # the reader raises many kinds of errors for damaged files
        raise ValueError(f"{gguf_file} is damaged ({type(error).__name__}: {error})") from error


def tokenizer_arguments(base_model: str, gguf_file: str | None) -> dict[str, str]:
    """Arguments for `AutoTokenizer.from_pretrained`: the GGUF file, unless the folder has a tokenizer of its own."""
    if gguf_file is None or any((Path(base_model) / name).is_file() for name in TOKENIZER_FILES):
        return {}
    logger.warning(
        "The tokenizer is rebuilt from %s, without its rules for splitting text before the vocabulary is used: "
        "for example, digits may become different tokens. To avoid this, put the model's tokenizer.json and "
        "tokenizer_config.json beside the file.",
        gguf_file,
    )
    return {"gguf_file": gguf_file}

"""Identifies the weights of a base model, whatever its name is."""

import functools
import hashlib
import json
import os
from pathlib import Path

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from mola.files.digests import file_sha256

_WEIGHTS = (".safetensors", ".bin", ".gguf")


def weights_identity(base_model: str | os.PathLike[str]) -> str:
    """The sha256 of a folder's weight files, "" if there are none; for a model on the hub its name and commit.

    Each process reads a file only once, unless the file changes.
    """
    folder = Path(base_model)
    if not folder.is_dir():
        commit = extract_commit_hash(cached_file(str(base_model), CONFIG_NAME), None)
        return f"{base_model}@{commit}"
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    if not files:
        return ""
    digests = {path.name: _sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


@functools.cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """The sha256 of a file, cached by its path, its size and the time of its last change."""
    return file_sha256(path)

"""Check that files are unchanged since they were saved, by checksums, and that their values are finite.

- An adapter's weights: `adapter_config.json` holds their sha256. The safetensors format has no checksum of its own, so
  changed values would be loaded.
- A page that mola may replace: the last line holds the sha256 of the text above.
- A file that `torch.save` wrote: it holds checksums of its parts, which `torch.load` ignores.
"""

import hashlib
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.reading import read_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "adapter_model.bin")  # PEFT loads the first one that exists
DIGEST_FIELD = "weights_sha256"
_PAGE_DIGEST = re.compile(r"\n<!-- Written by mola; sha256 of the text above: ([0-9a-f]{64}) -->\n\Z")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_weights(folder: str | os.PathLike[str]) -> Path | None:
    """The weights file that PEFT loads from an adapter's folder, or None."""
    return next((Path(folder, name) for name in WEIGHTS_FILES if os.path.isfile(Path(folder, name))), None)


def weights_sha256(folder: str | os.PathLike[str]) -> str | None:
    """The sha256 of an adapter's weights, in hexadecimal; None if the folder has no weights.

    Raises:
        MolaError: there are two weights files, and PEFT would load the older one.
    """
    first, second = (Path(folder, name) for name in WEIGHTS_FILES)
    if first.is_file() and second.is_file() and first.stat().st_mtime_ns < second.stat().st_mtime_ns:
        raise MolaError(
            f"`adapter` must be a folder with one file of weights: {os.fspath(folder)!r} holds "
            f"{' and '.join(WEIGHTS_FILES)}. Remove the older one, and save again."
        )
    path = find_weights(folder)
    return None if path is None else file_sha256(path)


def check_digest(folder: str | os.PathLike[str]) -> None:
    """Raise if an adapter's weights are not the ones that were saved with its configuration.

    A configuration without a sha256, from an earlier version or another program, passes.

    Raises:
        MolaError: the sha256 of the weights differs from the one in the configuration.
    """
    recorded = read_json_object(Path(folder, CONFIG_FILE)).get(DIGEST_FIELD)
    found = None if recorded is None else weights_sha256(folder)
    if found is not None and found != recorded:
        raise MolaError(
            f"{str(find_weights(folder))!r} is not the file that was saved: its sha256 begins with {found[:12]}, "
            f"{CONFIG_FILE} says {str(recorded)[:12]!r}. The file was damaged or replaced. Copy the folder again, or "
            f"use a checkpoint of the run. If you changed the weights on purpose, remove `{DIGEST_FIELD}` from "
            f"{CONFIG_FILE}."
        )


def check_finite(tensors: Mapping[str, Any], where: str) -> None:
    """Raise if one of the named tensors has NaN or infinite values, which would spoil every output.

    Args:
        tensors: name -> `torch.Tensor` or numpy array.
        where: name of the file, for the message.
    """
    for name, tensor in tensors.items():
        count = _count_not_finite(tensor)
        if count:
            raise MolaError(
                f"{where} must hold finite numbers: {count} of {math.prod(tensor.shape)} values of {name!r} are not "
                "finite. The training has diverged, or the file is damaged: use an earlier checkpoint, or train again "
                "with a lower `learning_rate`."
            )


def _count_not_finite(tensor: Any) -> int:
    if not hasattr(tensor, "is_floating_point"):  # a numpy array of floats
        import numpy as np

        return int(tensor.size - np.isfinite(tensor).sum())
    import torch

    if not tensor.is_floating_point():
        return 0
    # torch has no `isfinite` for 8-bit floats.
    is_finite = torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)
    return tensor.numel() - int(is_finite.sum())


def add_digest_line(text: str) -> str:
    """The text of a page (Markdown or HTML) and a last line that holds the sha256 of the text."""
    return f"{text}\n<!-- Written by mola; sha256 of the text above: {_text_sha256(text)} -->\n"


def is_own_file(path: Path) -> bool:
    """Whether mola wrote a page with `add_digest_line` and the page has not been changed since."""
    # Read as bytes, so that changed line ends are found.
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    found = _PAGE_DIGEST.search(text)
    return found is not None and _text_sha256(text[: found.start()]) == found[1]


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def find_damaged_part(path: str | os.PathLike[str]) -> str | None:
    """The first part with a wrong checksum in a file that `torch.save` wrote; None without one, or for other files.

    Raises:
        ValueError: the archive is broken.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"it is a broken archive ({error})") from error

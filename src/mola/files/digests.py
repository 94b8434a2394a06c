"""Whether files are those that were saved.

- `check_digest`: an adapter's weights, by the sha256 of their file in `adapter_config.json`. The format safetensors has
  no checksum of its own: values that changed on a disk or on the way would be loaded.
- `file_sha256`: any file, by the sha256 that a record holds.
- `damaged_record`: what `torch.save` wrote, by its own checksums.
"""

import hashlib
import os
import zipfile
import zlib
from pathlib import Path

from mola.errors import MolaError
from mola.files.reading import check_regular, read_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "adapter_model.bin")  # PEFT loads the first one there is
DIGEST_FIELD = "weights_sha256"


def find_weights(folder: str | os.PathLike[str]) -> Path | None:
    """The weights file that PEFT would load from a folder, or None."""
    return next((Path(folder, name) for name in WEIGHTS_FILES if os.path.isfile(Path(folder, name))), None)


def weights_sha256(folder: str | os.PathLike[str]) -> str | None:
    """The sha256 of a folder's weights, in hexadecimal; None without weights.

    Raises:
        MolaError: there are two files of weights, of which PEFT would load the older one.
    """
    first, second = (Path(folder, name) for name in WEIGHTS_FILES)
    if first.is_file() and second.is_file() and first.stat().st_mtime_ns < second.stat().st_mtime_ns:
        raise MolaError(
            f"`adapter` must be a folder with one file of weights: {os.fspath(folder)!r} holds "
            f"{' and '.join(WEIGHTS_FILES)}. Remove the older one, and save again."
        )
    path = find_weights(folder)
    return None if path is None else file_sha256(check_regular(path))


def check_digest(folder: str | os.PathLike[str]) -> None:
    """Compare the weights in an adapter's folder with what its configuration says about them.

    Without the field `weights_sha256` (an earlier version, another program) it says nothing.

    Raises:
        MolaError: they are not the weights that were saved, or cannot be read.
    """
    recorded = read_json_object(Path(folder, CONFIG_FILE)).get(DIGEST_FIELD)
    if recorded is None:
        return
    path = find_weights(folder)
    try:
        found = weights_sha256(folder)
    except OSError as error:
        raise MolaError(f"`adapter` has weights that cannot be read: {error}. Check the file.") from error
    if found is not None and found != recorded:
        raise MolaError(
            f"{str(path)!r} is not the file that was saved: its sha256 begins with {found[:12]}, {CONFIG_FILE} "
            f"says {str(recorded)[:12]!r}. It was damaged or replaced. Copy the folder again, or use a checkpoint of "
            f"the run; if the change was meant, remove `{DIGEST_FIELD}` from {CONFIG_FILE}."
        )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, in hexadecimal; it is read piece by piece, whatever its size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_record(path: str | os.PathLike[str]) -> str | None:
    """The name of the first part of a file of `torch.save` that has another checksum than it was written with, or None.

    These files are zip archives, which hold a checksum of each part, and `torch.load` does not look at them. Other
    files have none.

    Raises:
        OSError: the file cannot be read.
        ValueError: the archive is broken beyond its parts.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"it is a broken archive ({error})") from error

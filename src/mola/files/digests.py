"""Whether an adapter's weights are those that were saved: `adapter_config.json` records the sha256 of their file.

The format safetensors has no checksum of its own: values that changed on a disk or on the way would be loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from mola.errors import MolaError
from mola.files.atomic import file_sha256, read_json_object
from mola.files.reading import check_regular

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT loads the first one there is
DIGEST_FIELD = "weights_sha256"


def find_weights(folder: str | os.PathLike[str]) -> Path | None:
    """The weights file that PEFT would load from a folder, or None."""
    return next((Path(folder, name) for name in WEIGHTS_FILES if os.path.isfile(Path(folder, name))), None)


def weights_sha256(folder: str | os.PathLike[str]) -> str | None:
    """The sha256 of a folder's weights, in hexadecimal; None without weights.

    Raises:
        OSError: they cannot be read.
    """
    path = find_weights(folder)
    return None if path is None else file_sha256(check_regular(path))


def check_digest(folder: str | os.PathLike[str]) -> None:
    """Compare a folder's weights with what its configuration says about them.

    Without the field `weights_sha256` (an earlier version, another program) it says nothing.

    Args:
        folder: folder of the adapter.

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

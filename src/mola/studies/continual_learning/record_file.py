"""The file with the record of a sequence, and the checks of the folder that holds it; needs no torch."""

import os
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import WRITE_TEST, check_writable
from mola.files.reading import read_json

RECORD_FILE = "continual.json"
SKILLS_FOLDER = "skills"  # in the folder of the sequence
_LEFTOVERS = (f".{RECORD_FILE}.", WRITE_TEST)  # left by a call that was killed while writing


def read_record(folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """The record of an earlier call in this folder; None for a new folder."""
    if os.path.exists(folder) and not folder.is_dir():
        raise MolaError(f"`output_dir` must be a folder: {str(folder)!r} is a file. Pass a different name.")
    path = check_writable(folder / RECORD_FILE)
    if not path.exists():
        if not overwrite and any(not entry.name.startswith(_LEFTOVERS) for entry in folder.iterdir()):
            raise MolaError(
                f"`output_dir` must be empty or hold a sequence to resume: {str(folder)!r} has files but no "
                f"{RECORD_FILE}. Pass a different folder."
            )
        return None
    try:
        record: dict[str, Any] = read_json(path)
        for entry in record["stages"]:
            dict(entry["settings"], **entry["data_fingerprints"], folder=Path(entry["folder"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MolaError(
            f"{str(path)!r} cannot be read ({error}). Restore it, or pass a different `output_dir`."
        ) from error
    return record

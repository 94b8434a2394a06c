"""Results that are folders: they appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from mola.errors import MolaError
from mola.files.failures import writing


def check_new_folder(option: str, path: str | os.PathLike[str]) -> Path:
    """Refuse a folder with something in it, for a result that is a folder; creates nothing.

    Args:
        option: name of the option that holds the path, for the message.
        path: target folder.

    Raises:
        MolaError: it is a file, or not empty.
    """
    folder = Path(os.path.expanduser(path))
    if os.path.exists(folder) and not folder.is_dir():
        raise MolaError(f"`{option}` must be a folder, got the file {os.fspath(path)!r}. Choose another name.")
    if os.path.isdir(folder) and any(folder.iterdir()):
        raise MolaError(
            f"`{option}` must not exist or be empty, got {os.fspath(path)!r} with files in it. Choose another folder."
        )
    return folder


@contextlib.contextmanager
def new_folder(option: str, folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends well, and is removed when it does not.

    Args:
        option: name of the option that holds the path, for the message.
        folder: target folder, as `check_new_folder` returned it.

    Raises:
        MolaError: it cannot be written.
    """
    # Not mkdtemp: its folders are closed to other users.
    temporary = folder.parent / f".{folder.name[:80]}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
    except (OSError, ValueError) as error:
        raise MolaError(
            f"`{option}` cannot be written: {str(folder)!r} ({error}). Choose a folder you can write to."
        ) from error
    try:
        with writing(f"`{option}`"):
            yield temporary
            if folder.is_dir():
                folder.rmdir()  # empty, or this fails; a rename onto a folder does not work everywhere
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

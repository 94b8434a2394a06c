"""Writing results without half-written files: a temporary name in the same folder, then a rename.

- `append_lines`: the one exception, for journals: readers pass over a last line that is cut off.
- `atomic_write_bytes`, `atomic_write_text`, `atomic_write_json`: readers see the old file or the new one, never a part.
- `check_writable`, `check_new_file`: fail before the long work, not after it.
"""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.failures import writing

WRITE_TEST = ".write-test-"  # names of files that `check_writable` makes for a moment


def check_new_file(option: str, path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`check_writable` for a result that must not replace another one unasked; `option` is the path's, for the message.

    Raises:
        MolaError: it exists, or its folder or itself cannot be written.
    """
    target = check_writable(path)
    if target.exists() and not overwrite:
        raise MolaError(f"`{option}` must be a new file: {os.fspath(path)!r} exists. Pass another name or `overwrite`.")
    return target


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`atomic_write_bytes` of `text` in UTF-8; newlines are written as given."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write or replace the file `path` in one step; parent folders are created.

    Raises:
        MolaError: the folder or the file cannot be written.
    """
    target = check_writable(path)
    # Of a name in any script no more than file systems take, with what is added.
    # A plain open, not `tempfile`: the result gets the permissions of any other new file.
    temporary = target.parent / f".{target.name[:40]}.{uuid.uuid4().hex}.tmp"
    try:
        with writing(repr(str(target))):
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return target


def keep_on_disk(*paths: str | os.PathLike[str]) -> None:
    """Wait until files and folders are on the disk, and not in the machine's memory alone, which loses power."""
    for path in paths:
        with contextlib.suppress(OSError):  # of a system that opens no folders, or a file system that does not say
            place = os.open(path, os.O_RDONLY)
            try:
                os.fsync(place)
            finally:
                os.close(place)


def append_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Add lines, given without their ends, to a text file in UTF-8; it is made where there is none.

    Raises:
        MolaError: the file cannot be written; a part of the lines may be in it.
    """
    with writing(repr(os.fspath(path))), open(path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def atomic_write_json(path: str | os.PathLike[str], data: Any, indent: int | None = 2) -> Path:
    """Write `data` as JSON to `path` in one step, UTF-8, with a final newline; on one line if `indent` is None.

    Raises:
        MolaError: the folder or the file cannot be written.
        ValueError: `data` holds NaN or an infinity, which JSON has not.
        TypeError: `data` holds something JSON has no form for.
    """
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    return atomic_write_text(path, text + "\n")


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make sure the file `path` can be written, creating its parent folders; its content is untouched.

    Raises:
        MolaError: `path` is a folder or a device, or its folder cannot be created or written to.
    """
    target = Path(path)
    if os.path.isdir(target):
        raise MolaError(f"`{target}` must be a file to write: it is a folder. Add a file name to the path.")
    if os.path.exists(target) and not os.path.isfile(target):  # which the new file would replace
        raise MolaError(f"`{target}` must be a file to write: it is a device or a pipe. Pass another name.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=WRITE_TEST):
            pass
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # finds a name that is too long, or that holds what no name can hold
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        place = getattr(error, "filename", None) or target.parent
        raise MolaError(
            f"{str(target)!r} cannot be written: {reason}: {place}. Choose a path in a folder you can write to."
        ) from error
    return target

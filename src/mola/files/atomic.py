"""Writing results without half-written files: a temporary name in the same folder, then a rename.

- `append_lines`: the one exception, for journals: readers pass over a last line that is cut off.
- `atomic_write_bytes`, `atomic_write_text`, `atomic_write_json`: readers see the old file or the new one, never a part.
- `check_writable`, `check_new_file`: fail before the long work, not after it.
- `check_new_folder`, `new_folder`: the same for a whole folder.
- `read_json_object`: what a record says, if it is there and readable.
- `file_sha256`: whether a file is still the one that a record speaks of.
- `damaged_record`: whether what `torch.save` wrote is still as it was.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.failures import writing
from mola.files.reading import read_json

_PIECE = 1 << 20


def check_new_file(option: str, path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`check_writable` for a result that must not replace another one unasked.

    Args:
        option: name of the option that holds the path, for the message.
        path: target file.
        overwrite: whether it may exist.

    Raises:
        MolaError: it exists, or its folder or itself cannot be written.
    """
    if os.path.exists(path) and not overwrite:
        raise MolaError(f"`{option}` must be a new file: {os.fspath(path)!r} exists. Pass another name or `overwrite`.")
    return check_writable(path)


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


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`atomic_write_bytes` of `text` in UTF-8; newlines are written as given."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path` in one step; parent folders are created.

    Args:
        path: target file; replaced when it exists.
        content: the whole content.

    Returns:
        The path written.

    Raises:
        MolaError: the folder or the file cannot be written.
    """
    target = check_writable(path)
    # A plain open, not `tempfile`: the result gets the permissions of any other new file.
    temporary = target.parent / f".{target.name[:80]}.{uuid.uuid4().hex}.tmp"
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


def append_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Add lines to a text file in UTF-8.

    Args:
        path: the file; made where there is none.
        lines: without their ends.

    Raises:
        MolaError: the file cannot be written; a part of the lines may be in it.
    """
    with writing(repr(os.fspath(path))), open(path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def atomic_write_json(path: str | os.PathLike[str], data: Any, indent: int | None = 2) -> Path:
    """Write `data` as JSON to `path` in one step, UTF-8, with a final newline.

    Args:
        path: target file; replaced when it exists.
        data: anything `json.dumps` takes; NaN and infinities are refused, JSON has none.
        indent: spaces per level; None writes one line.

    Returns:
        The path written.

    Raises:
        MolaError: the folder or the file cannot be written.
        ValueError: `data` holds NaN or an infinity.
        TypeError: `data` holds something JSON has no form for.
    """
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    return atomic_write_text(path, text + "\n")


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object; empty if there is no readable one."""
    try:
        content = read_json(path, half_characters=True)  # text of a model may hold them
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make sure the file `path` can be written, creating its parent folders; its content is untouched.

    Args:
        path: a file to be written later.

    Returns:
        The path.

    Raises:
        MolaError: `path` is a folder, or its folder cannot be created or written to.
    """
    target = Path(path)
    if os.path.isdir(target):
        raise MolaError(f"`{target}` must be a file to write: it is a folder. Add a file name to the path.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".write-test-"):
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


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, in hexadecimal.

    Args:
        path: the file; it is read piece by piece, whatever its size.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def damaged_record(path: str | os.PathLike[str]) -> str | None:
    """The first part of a file of `torch.save` that has another checksum than it was written with.

    These files are zip archives, which hold a checksum of each part, and `torch.load` does not look at them.

    Returns:
        Its name; None for a file without damage, or that is no zip archive.

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

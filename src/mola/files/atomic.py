"""Write files and folders so that a reader finds the old content or the new content, never a part of it.

A result is written under a temporary name in the same folder, and then renamed. `append_lines` is the exception: its
readers must skip an incomplete last line.
"""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.failures import explain_write_errors

WRITE_TEST = ".write-test-"  # names of files that exist for a moment, to find out whether a folder can be written to


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make sure before long work that the file `path` can be written; creates its folder.

    Raises:
        MolaError: `path` is a folder or a device, or its folder cannot be created or written to.
    """
    target = Path(path)
    try:
        _check_no_device(target)  # also finds a name that is too long
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MolaError(f"{str(target)!r} cannot be written: {error}. Choose another path.") from error
    _check_access(repr(str(target)), target.parent)
    return target


def check_new_file(option: str, path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`check_writable`, which also raises if the file exists and `overwrite` is False; `option` is for the message."""
    target = check_writable(path)
    if target.exists() and not overwrite:
        raise MolaError(f"`{option}` must be a new file: {os.fspath(path)!r} exists. Pass another name or `overwrite`.")
    return target


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write or replace a text file in UTF-8 in one step; newlines stay as given."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], data: Any, indent: int | None = 2) -> Path:
    """Write or replace a JSON file in one step, in UTF-8 with a final newline; on one line if `indent` is None.

    Raises:
        ValueError: `data` holds NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    return atomic_write_text(path, text + "\n")


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write or replace a file in one step; its folder is created.

    Raises:
        MolaError: the file cannot be written, for example because the disk is full.
    """
    target = Path(path)
    _check_no_device(target)
    # The name is cut, because the file system limits the length of the temporary name.
    # A plain open instead of `tempfile`: the result gets the permissions of any other new file.
    temporary = target.parent / f".{target.name[:40]}.{uuid.uuid4().hex}.tmp"
    try:
        with explain_write_errors(repr(str(target))):
            target.parent.mkdir(parents=True, exist_ok=True)
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


def _check_no_device(target: Path) -> None:
    if target.exists() and not target.is_file():  # a rename would replace /dev/null
        raise MolaError(f"`{target}` must be a file to write: it is a folder or a device. Pass another name.")


def append_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Append lines, given without line ends, to a text file in UTF-8."""
    with explain_write_errors(repr(os.fspath(path))), open(path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def flush_to_disk(*paths: str | os.PathLike[str]) -> None:
    """Flush files and folders to the disk, so that they survive a loss of power."""
    for path in paths:
        with contextlib.suppress(OSError):  # Windows cannot open a folder
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_new_folder(option: str, path: str | os.PathLike[str]) -> Path:
    """Make sure before long work that a result can become the folder `path`, which must be new or empty.

    Returns:
        The folder; if `path` is a link, the folder that the link points to.
    """
    folder = Path(path).expanduser().resolve()
    if os.path.exists(folder) and not folder.is_dir():
        raise MolaError(f"`{option}` must be a folder, got the file {os.fspath(path)!r}. Choose another name.")
    if folder.is_dir() and any(folder.iterdir()):
        raise MolaError(
            f"`{option}` must be new or empty, got {os.fspath(path)!r} with files in it. Choose another folder."
        )
    _check_can_be_replaced(option, folder)
    return folder


def check_output_folder(
    folder: Path, *, option: str, overwrite: bool, overwrite_option: str, writer: str, is_own: Callable[[Path], bool]
) -> None:
    """Make sure before long work that a result can become or replace a folder.

    A folder with files is replaced as a whole, so it must hold only files that the same command wrote.

    Args:
        folder: the folder to write.
        option: the option that names the folder, for messages.
        overwrite: whether a folder with files may be replaced.
        overwrite_option: the option that allows replacing, for messages.
        writer: the command, for messages.
        is_own: whether a folder holds only what `writer` writes.

    Raises:
        MolaError: `folder` is a file, or has files and must not be replaced, or cannot be written.
    """
    if os.path.exists(folder) and not folder.is_dir():
        raise MolaError(f"`{option}` must be a folder: `{folder}` is a file. Choose another name.")
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    if names and not overwrite:
        raise MolaError(
            f"`{option}` must be empty: `{folder}` is not. Choose another folder, or pass `{overwrite_option}` to "
            "replace it."
        )
    if names and not is_own(folder):
        raise MolaError(
            f"`{option}` is replaced only if {writer} wrote it: `{folder}` holds {', '.join(names[:5])}. "
            "Choose another folder."
        )
    _check_can_be_replaced(option, folder)


def _check_can_be_replaced(option: str, folder: Path) -> None:
    if os.path.ismount(folder):
        raise MolaError(
            f"`{option}` must be a folder that can be renamed: {str(folder)!r} is a mount. Add a name to it."
        )
    _check_access(f"`{option}`", folder.parent)


def _check_access(what: str, folder: Path) -> None:
    """Check that a file can be made in `folder`, or in the nearest parent folder that exists."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing, prefix=WRITE_TEST):
            pass
    except OSError as error:
        raise MolaError(
            f"{what} cannot be written: {error.strerror}: {str(existing)!r}. Choose another folder."
        ) from error


@contextlib.contextmanager
def write_folder(folder: Path, option: str = "output_dir", *, replaces: bool = True) -> Iterator[Path]:
    """Write or replace a folder in one step: it appears when the block ends without an error.

    Args:
        folder: the folder to write; the folders above it are created.
        option: the option that names the folder, for messages.
        replaces: whether a folder with files is replaced.

    Yields:
        A temporary folder to fill.

    Raises:
        MolaError: a file cannot be written, for example because the disk is full; or `folder` has files when the block
            ends, and `replaces` is False.
    """
    hidden_name = f".{folder.name[:40]}.{uuid.uuid4().hex}"
    temporary, old = folder.parent / f"{hidden_name}.tmp", folder.parent / f"{hidden_name}.old"
    try:
        with explain_write_errors(f"`{option}`"):
            temporary.mkdir(parents=True)
            yield temporary
            if folder.is_dir() and not replaces and any(folder.iterdir()):
                raise MolaError(
                    f"`{option}` must be new or empty: another program has written to {str(folder)!r} since this "
                    "command began. Choose another folder."
                )
            if folder.exists():  # a folder with files cannot be overwritten
                os.replace(folder, old)
            try:
                os.replace(temporary, folder)
            except BaseException:
                if old.exists():
                    os.replace(old, folder)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_new_folder(option: str, folder: Path) -> contextlib.AbstractContextManager[Path]:
    """`write_folder` for a folder that must be new or empty."""
    return write_folder(folder, option, replaces=False)

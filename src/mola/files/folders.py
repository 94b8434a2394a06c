"""Results that are folders: what they may replace, and that they appear complete or not at all."""

import errno
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mola.errors import MolaError
from mola.files.atomic import WRITE_TEST
from mola.files.failures import writing

logger = logging.getLogger(__name__)

# Without them a folder is taken for nothing that mola writes.
_LAST = ("dataset_dict.json", "dataset_info.json", "adapter_config.json", "config.json")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # raised without a file's name


def check_new_folder(option: str, path: str | os.PathLike[str]) -> Path:
    """Refuse a file, or a folder with something in it, for a result that is a folder; creates nothing.

    Returns:
        The folder itself where `path` is a link, so that a rename does not replace that.
    """
    folder = Path(os.path.expanduser(path)).resolve()
    if os.path.exists(folder) and not folder.is_dir():
        raise MolaError(f"`{option}` must be a folder, got the file {os.fspath(path)!r}. Choose another name.")
    try:
        is_used = os.path.isdir(folder) and any(folder.iterdir())
    except OSError as error:
        raise MolaError(f"`{option}` cannot be read: `{folder}` ({error.strerror}). Choose another folder.") from error
    if is_used:
        raise MolaError(
            f"`{option}` must be new or empty, got {os.fspath(path)!r} with files in it. Choose another folder."
        )
    _check_can_be_written(option, folder)
    return folder


def check_output_folder(
    folder: Path, *, option: str, overwrite: bool, overwrite_option: str, writer: str, is_own: Callable[[Path], bool]
) -> None:
    """Refuse a folder that holds something, unless it is to be replaced and holds only what we wrote.

    What a killed command left beside the folder is named in a warning; the result that it was about to replace is put
    back first. `is_own` tells whether a folder looks like what `writer` writes; all names are for messages.

    Raises:
        MolaError: `folder` is a file, or is not empty and cannot be replaced.
    """
    _restore_replaced(folder, is_own)
    # `Path.exists` would raise where a folder above must not be entered, or a name is too long.
    if not os.path.exists(folder):
        _check_can_be_written(option, folder)
        return
    if not os.path.isdir(folder):
        raise MolaError(f"`{option}` must be a folder: `{folder}` is a file. Choose another name.")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise MolaError(f"`{option}` cannot be read: `{folder}` ({error.strerror}). Choose another folder.") from error
    if names and not overwrite:
        raise MolaError(
            f"`{option}` must be empty: `{folder}` is not. Choose another folder, or pass `{overwrite_option}` to "
            "replace it."
        )
    _check_can_be_written(option, folder)
    # The folder is replaced as a whole, so it must hold nothing that someone else put there.
    if names and not is_own(folder):
        raise MolaError(
            f"`{option}` is replaced only if {writer} wrote it: `{folder}` holds {', '.join(names[:5])}. "
            "Choose another folder."
        )


def _check_can_be_written(option: str, folder: Path) -> None:
    """Fail before the long work, not after it; nothing stays there, and the folder is not made."""
    above = [folder, *folder.parents] if _stays(folder) else folder.parents
    place = next((each for each in above if os.path.isdir(each)), Path("."))
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=WRITE_TEST):
            pass
    except OSError as error:
        raise MolaError(
            f"`{option}` cannot be written: {error.strerror}: {str(place)!r}. Choose another folder."
        ) from error


def _restore_replaced(folder: Path, is_own: Callable[[Path], bool]) -> None:
    """Deal with the hidden folders of a `complete_folder` that was killed."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{32}}\.(tmp|scratch|old)")
    left = sorted(path for path in folder.parent.glob(".*") if name.fullmatch(path.name) and path.is_dir())
    replaced = [path for path in left if path.suffix == ".old" and is_own(path)]
    if replaced and not os.path.lexists(folder):
        newest = max(replaced, key=lambda path: path.stat().st_mtime)
        try:
            os.replace(newest, folder)
        except OSError as error:
            raise MolaError(
                f"`{newest}` holds the result of `{folder}` from before a command that was killed, and cannot be "
                f"renamed to it: {error}. Rename it, or delete it."
            ) from error
        left.remove(newest)
        logger.warning("%s is back as it was: a command that was replacing it has been killed.", folder)
    if left:
        logger.warning(
            "%s: left by a command that was killed, unless one is writing %s now. Delete them to free the space.",
            ", ".join(str(path) for path in left),
            folder,
        )


@contextmanager
def complete_folder(folder: Path, option: str = "output_dir", *, replaces: bool = True) -> Iterator[tuple[Path, Path]]:
    """Write or replace a folder under a temporary name; it takes its place when the block ends without an error.

    Where it `replaces` nothing, what has come into the folder meanwhile stays, and is an error.

    A folder that cannot be renamed, or should not be, since a file system is mounted there or this process works in
    it, gets the files one after the other, those in `_LAST` at the end.

    Yields:
        The folder to fill, and a second one for scratch files that goes away in any case.

    Raises:
        MolaError: the folder cannot be written, or holds something by now that is not to be replaced. Other errors of
            the block, also an OSError of a file elsewhere, pass.
    """
    mark, stays = uuid.uuid4().hex, _stays(folder)
    temporary, scratch, old = (
        (folder if stays else folder.parent) / f".{folder.name}.{mark}.{ending}" for ending in ("tmp", "scratch", "old")
    )
    try:
        try:
            temporary.mkdir(parents=True)
            scratch.mkdir()
        except (OSError, ValueError) as error:  # the latter for what no folder can be called
            raise MolaError(f"`{option}` cannot be written: {error}. Choose another folder.") from error
        with _write_errors(option, within=(temporary, scratch)):
            yield temporary, scratch
        if not replaces:
            _check_still_empty(folder, option, besides=(temporary, scratch))
        with _write_errors(option):
            (_put_inside if stays else _put_in_place)(temporary, folder, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def new_folder(option: str, folder: Path) -> Iterator[Path]:
    """`complete_folder` without scratch files, for results that libraries write; refuses one that cannot be written."""
    with writing(f"`{option}`"), complete_folder(folder, option, replaces=False) as (temporary, _):
        yield temporary


def _check_still_empty(folder: Path, option: str, besides: tuple[Path, ...]) -> None:
    found = [path.name for path in folder.iterdir() if path not in besides] if folder.is_dir() else []
    if found:
        raise MolaError(
            f"`{option}` must be new or empty: {found[0]!r} has come into {str(folder)!r} since this command "
            "began, and is kept. Choose another folder."
        )


def _stays(folder: Path) -> bool:
    """Whether a folder has to stay the same directory."""
    try:
        return folder.is_dir() and (os.path.ismount(folder) or folder.samefile(os.curdir))
    except OSError:  # this process works in a folder that is gone
        return False


def _put_inside(temporary: Path, folder: Path, old: Path) -> None:
    """Files of a folder to the one above, where what was there before goes away."""
    before = [path for path in folder.iterdir() if not path.name.startswith(temporary.name.rpartition(".")[0])]
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for path in [*before, *sorted(temporary.iterdir(), key=lambda path: (path.name in _LAST, path.name))]:
            target = (old if path.parent == folder else folder) / path.name
            moved.append((path, target))
            os.replace(path, target)
    except BaseException:  # an interrupt, too: what was there before may not stay in a hidden folder
        for path, target in reversed(moved):
            if not os.path.lexists(path):  # the last one may not have been moved
                os.replace(target, path)
        old.rmdir()
        raise
    _remove(old, folder)


def _put_in_place(temporary: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        os.replace(temporary, folder)
        return
    # A folder with files cannot be renamed over; the old one goes only when the new one is there.
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(old, folder)
        raise
    _remove(old, folder)


def _remove(old: Path, folder: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:
        logger.warning("%s is complete, but what it replaced could not be removed from %s: %s.", folder, old, error)


@contextmanager
def _write_errors(option: str, within: tuple[Path, ...] = ()) -> Iterator[None]:
    """Report errors of writing; with `within` only those of files in these folders, and of a full disk."""
    try:
        yield
    except OSError as error:
        if within and error.errno not in _NO_SPACE and not _is_about(error, within):
            raise
        raise MolaError(f"`{option}` cannot be written: {error}. Choose another folder.") from error


def _is_about(error: OSError, folders: tuple[Path, ...]) -> bool:
    names = [Path(os.path.abspath(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, Path))]
    return any(name.is_relative_to(os.path.abspath(folder)) for name in names for folder in folders)

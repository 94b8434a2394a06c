"""A folder of results: what it may replace, and that it appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mola.errors import MolaError


def check_output_folder(
    folder: Path, *, option: str, overwrite: bool, overwrite_option: str, writer: str, is_own: Callable[[Path], bool]
) -> None:
    """Refuse a folder that holds something, unless it is to be replaced and holds only what we wrote.

    Args:
        folder: where results will go.
        option: name of the option that names it, for messages.
        overwrite: whether an own folder is to be replaced.
        overwrite_option: name of the option that says so, for messages.
        writer: what writes such folders, for messages.
        is_own: whether a folder looks like what `writer` writes.

    Raises:
        MolaError: `folder` is a file, or is not empty and cannot be replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise MolaError(f"`{option}` must be a folder: `{folder}` is a file. Choose another name.")
    names = sorted(entry.name for entry in folder.iterdir())
    if names and not overwrite:
        raise MolaError(
            f"`{option}` must be empty: `{folder}` is not. Choose another folder, or pass `{overwrite_option}` to "
            "replace it."
        )
    # The folder is replaced as a whole, so it must hold nothing that someone else put there.
    if names and not is_own(folder):
        raise MolaError(
            f"`{option}` is replaced only if {writer} wrote it: `{folder}` holds {', '.join(names[:5])}. "
            "Choose another folder."
        )


@contextmanager
def complete_folder(folder: Path, option: str = "output_dir") -> Iterator[tuple[Path, Path]]:
    """Write a folder under a temporary name; it takes its place when the block ends without an error.

    Args:
        folder: folder to create; an existing one is replaced as a whole.
        option: name of the option that names it, for messages.

    Yields:
        The folder to fill, and a second one for scratch files that goes away in any case.

    Raises:
        MolaError: the folder cannot be written.
    """
    temporary, scratch, old = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{ending}") for ending in ("tmp", "scratch", "old")
    )
    try:
        temporary.mkdir(parents=True)
        scratch.mkdir()
        yield temporary, scratch
        if folder.exists():
            # A folder with files cannot be renamed over; the old one goes only when the new one is there.
            os.replace(folder, old)
            try:
                os.replace(temporary, folder)
            except OSError:
                os.replace(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    except OSError as error:
        raise MolaError(f"`{option}` cannot be written: {error}. Choose another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)

"""Locks through which several processes with the same command share the work of a study."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

POLL_SECONDS = 5.0  # between two looks at what others have left


class Locks:
    """The locks of one study, by name, in a folder that is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lock(self, name: str) -> BaseFileLock:
        """A lock to wait for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / name)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether no other process is at work on it; none will be in the block. A killed process claims nothing."""
        lock = self.lock(name)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

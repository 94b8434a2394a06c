"""Locks through which several processes with the same command share the work of a study."""

from contextlib import AbstractContextManager
from pathlib import Path

from mola.files.locks import held

POLL_SECONDS = 5.0  # between two looks at what others have left


class Locks:
    """The locks of one study, by name, in a folder that is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lock(self, name: str) -> AbstractContextManager[bool]:
        """A lock to wait for."""
        return self._held(name, waits=True)

    def claim(self, name: str) -> AbstractContextManager[bool]:
        """Whether no other process is at work on it; none will be in the block. A killed process claims nothing."""
        return self._held(name, waits=False)

    def _held(self, name: str, *, waits: bool) -> AbstractContextManager[bool]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return held(self.folder / name, waits=waits)

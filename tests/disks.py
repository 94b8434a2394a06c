"""Small file systems in memory, for tests of full disks and of disks that cannot be written."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_RESERVE = "reserve"  # a file that takes up room


class Disk:
    """A file system of its own, mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size: int) -> None:
        """Another size in bytes."""
        self._remount(f"size={size}")

    def fill(self, leave: int = 0) -> None:
        """Take up all room but `leave` bytes, which are rounded to whole blocks."""
        with open(self.path / _RESERVE, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                file.truncate(max(0, file.tell() - leave))

    def make_read_only(self) -> None:
        """Nobody can write any more, root included."""
        self._remount("ro")

    def make_writable(self) -> None:
        """As before, with all room again."""
        self._remount("rw")
        (self.path / _RESERVE).unlink(missing_ok=True)

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@contextmanager
def disk(path: Path, size: int = 1 << 24) -> Iterator[Disk]:
    """Mount a file system at `path`, which is made; the test is skipped where that is not allowed."""
    path.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', error)!r}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)

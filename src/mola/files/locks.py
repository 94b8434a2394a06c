"""Locks between the processes of a machine."""

import errno
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 5.0  # between two looks at what other processes have left of work that is shared
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_warn_once = functools.cache(logging.getLogger(__name__).warning)


def warn_of_no_locks(folder: Path) -> None:
    """Say once that a folder cannot be locked."""
    _warn_once("The file system of %s has no locks: another process that writes there would not be noticed.", folder)


@contextmanager
def hold_lock(path: Path, *, waits: bool) -> Iterator[bool]:
    """Whether the lock in this file is the caller's within the block; a killed process holds none.

    On a file system without locks it is, and a warning says so once.

    Args:
        path: the lock's file; its folder is made.
        waits: until another process gives it back, instead of finding that it is not free.
    """
    lock = FileLock(path, fallback_to_soft=False)  # a soft one stays when its holder is killed
    try:
        lock.acquire(blocking=waits)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warn_of_no_locks(path.parent)
        yield True
        return
    try:
        yield True
    finally:
        lock.release()

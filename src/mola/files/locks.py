"""Locks between the processes of a machine."""

import errno
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_warn_once = functools.cache(logging.getLogger(__name__).warning)


@contextmanager
def held(path: Path, *, waits: bool) -> Iterator[bool]:
    """Whether the lock in this file is the caller's within the block; a killed process holds none.

    On a file system without locks it is, and a warning says so once.

    Args:
        path: the lock's file.
        waits: until another process gives it back, instead of finding that it is not free.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=waits)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:  # the second from filelock before 3.13
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        what = "The file system of %s has no locks: another process that writes there would not be noticed."
        _warn_once(what, path.parent)
        yield True
        return
    try:
        yield True
    finally:
        lock.release()

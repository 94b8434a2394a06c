"""Locks a folder while one program changes it, without a lock file."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from mola.errors import MolaError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path, message: str) -> Iterator[None]:
    """Lock a folder during the block.

    Raises:
        MolaError: another program on this machine has locked the folder; the error says `message`.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            os.close(descriptor)
            raise MolaError(message) from None
        logger.warning("%s cannot be locked: another program in it would not be noticed.", folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # processes that were forked meanwhile hold the lock too
        os.close(descriptor)

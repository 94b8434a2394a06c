"""Freed memory stays with the process, for programs that soon need it again: training steps.

When a large tensor is freed, glibc's malloc gives its pages back to the system, and those of the next one have to be
made and filled with zeros again. On a CPU that is 4 to 7 % of a training step.
"""

import ctypes
import os

CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user sets glibc's malloc."""
KEPT = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}
"""The same as `keep_freed_memory`, for the environment of a process that is yet to be started."""
_MALLOPT = {-1: -1, -4: 0}  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no block outside the heap


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, if it is glibc's and the user has not chosen otherwise.

    Returns:
        Whether it does from now on.
    """
    if not _is_glibc() or any(name in os.environ for name in CHOICES) or _other_allocator():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, value) == 1 for name, value in _MALLOPT.items())


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # not Unix, or another C library
        return False


def _other_allocator() -> bool:
    """Whether an allocator such as jemalloc, tcmalloc or mimalloc is loaded in place of glibc's."""
    return "alloc" in os.environ.get("LD_PRELOAD", "")

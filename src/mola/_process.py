"""What is different when the process is one of mola's own programs: the `mola` command or a script of `scripts/`.

- Waiting: OpenMP threads wait for each other at barriers by spinning. When other programs hold the cores, a step of
  one second can become a minute. Passive waiting cures that; it has to be set before torch is imported.
- Memory: the process keeps what it frees, for it soon needs it again: training steps. When a large tensor is freed,
  glibc's malloc gives its pages back to the system, and those of the next one have to be made and filled with zeros
  again. On a CPU that is 4 to 7 % of a training step.
- Messages: PEFT imports bitsandbytes where it is installed, which then recommends another package; every run, quantised
  or not, would begin with that.
- Imports: a program imports what its command needs, so that preparing data needs no torch.

A library does not change its host program's environment and messages, and offers all of its names: none of this holds
for others.
"""

import ctypes
import logging
import os
import sys
from pathlib import Path

CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user sets glibc's malloc."""
KEPT = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}
"""The same as `keep_freed_memory`, for the environment of a process that is yet to be started."""
SET: list[str] = []
"""Variables of the environment that were set here, by name."""
_MALLOPT = {-1: -1, -4: 0}  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no block outside the heap
_COMMAND = ("mola", "mola.exe", "mola-script.py")
_MODULES = ("mola", "mola.cli")
_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")  # options of Python whose value is the next word
_SCRIPT_LINE = "from mola.cli import run_script"
_LONGEST_SCRIPT = 1 << 16  # characters looked at


def is_own_program(program: str) -> bool:
    """Whether a process that was started as `program` runs a command of mola: the command itself, or a script for one.

    Not by the name of a script: people have programs of their own that are called like those of the research code.
    """
    path = Path(program)
    if path.name in _COMMAND:
        return True
    if path.suffix != ".py":
        return False
    try:
        with path.open(encoding="utf-8") as file:
            return any(line.strip() == _SCRIPT_LINE for line in file.read(_LONGEST_SCRIPT).splitlines())
    except (OSError, ValueError):
        return False


def prefer_passive_waiting() -> None:
    """Set `OMP_WAIT_POLICY=PASSIVE` if the user has not chosen."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        SET.append("OMP_WAIT_POLICY")


def hush_recommendations() -> None:
    """Leave out what bitsandbytes says about an optional kernel while it is imported; its errors stay."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def is_own_module(words: list[str]) -> bool:
    """Whether a command line of Python runs `-m mola`, as launchers of several processes do (or `-m mola.cli`).

    What stands behind a script or another module is that one's own: `pytest -m mola` is no program of mola.
    """
    rest = iter(words[1:])
    for word in rest:
        if word in _WITH_VALUE:
            next(rest, None)
        elif not word.startswith(("--", "-X", "-W")):
            letters, is_module, name = word[1:].partition("m")
            if not word.startswith("-") or word == "-" or "c" in letters:  # a script, standard input, a text
                return False
            if is_module:
                return (name or next(rest, "")) in _MODULES
    return False


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


OWN_PROGRAM = is_own_program(sys.argv[0] if sys.argv else "") or is_own_module(sys.orig_argv)

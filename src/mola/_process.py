"""Settings of a process that runs the `mola` command or one of the scripts, made before it imports torch.

A library must not change the environment and the messages of its host program, so no other process gets them.
"""

import ctypes
import logging
import os
import platform
import sys
from pathlib import Path

MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user sets glibc's malloc."""
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}
"""The effect of `keep_freed_memory` as environment variables, for a process that is yet to be started."""
SET: list[str] = []
"""Names of the environment variables that `set_up_command` has set."""
_PROGRAMS = ("mola", "mola.exe", "mola-script.py")
_SCRIPT_LINE = "from mola.cli import run_script"


def is_mola_command() -> bool:
    """Whether this process was started as `mola`, `python -m mola`, or a script that runs a mola command.

    A script is recognised by its text and not by its name: users have programs with the same names.
    """
    program = Path(sys.argv[0] if sys.argv else "")
    if program.name == "-m":  # Python is importing the package of the module that it will run
        return "mola" in sys.orig_argv or "mola.cli" in sys.orig_argv
    if program.suffix != ".py" or program.name in _PROGRAMS:
        return program.name in _PROGRAMS
    try:
        return _SCRIPT_LINE in program.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False


def set_up_command() -> None:
    """Make a mola command faster and quieter; call this before torch is imported.

    - OpenMP threads wait passively, unless the user has chosen otherwise: a thread that spins at a barrier can make a
      step of one second take a minute when other programs hold the cores.
    - Freed memory stays with the process, see `keep_freed_memory`.
    - bitsandbytes does not recommend a further package on every import. Its errors are still logged.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        SET.append("OMP_WAIT_POLICY")
    keep_freed_memory()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed memory, unless the user has chosen otherwise or uses a different allocator.

    Training soon needs the memory again. By default malloc returns the pages of large tensors to the system, which
    has to fill new pages with zeros: 4 to 7 % of a training step on a CPU.

    Returns:
        Whether malloc keeps freed memory from now on.
    """
    is_chosen = any(name in os.environ for name in MALLOC_VARIABLES)
    has_other_allocator = "alloc" in os.environ.get("LD_PRELOAD", "")  # such as jemalloc, tcmalloc or mimalloc
    if is_chosen or has_other_allocator or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never_trim = mallopt(-1, -1)  # M_TRIM_THRESHOLD
    no_block_outside_the_heap = mallopt(-4, 0)  # M_MMAP_MAX
    return bool(never_trim and no_block_outside_the_heap)

"""What is different when the process is one of mola's own programs: the `mola` command or a script of `scripts/`.

- Waiting: OpenMP threads wait for each other at barriers by spinning. When other programs hold the cores, a step of
  one second can become a minute. Passive waiting cures that; it has to be set before torch is imported.
- Memory: the process keeps what it frees; see `mola._memory`.
- Messages: PEFT imports bitsandbytes where it is installed, which then recommends another package; every run, quantised
  or not, would begin with that.
- Imports: a program imports what its command needs, so that preparing data needs no torch.

A library does not change its host program's environment and messages, and offers all of its names: none of this holds
for others.
"""

import itertools
import logging
import os
import sys
from pathlib import Path

_COMMAND = ("mola", "mola.exe", "mola-script.py")
_MODULES = ("mola", "mola.cli")
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
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def hush_recommendations() -> None:
    """Leave out what bitsandbytes says about an optional kernel while it is imported; its errors stay."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def is_own_module(words: list[str]) -> bool:
    """Whether a command line of Python runs `-m mola`, as launchers of several processes do (or `-m mola.cli`)."""
    return any(option == "-m" and name in _MODULES for option, name in itertools.pairwise(words))


OWN_PROGRAM = is_own_program(sys.argv[0] if sys.argv else "") or is_own_module(sys.orig_argv)

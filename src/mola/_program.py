"""What is different when the process is one of mola's own programs: the `mola` command or a script of `scripts/`.

- Waiting: OpenMP threads wait for each other at barriers by spinning. When other programs hold the cores, a step of
  one second can become a minute. Passive waiting cures that; it has to be set before torch is imported.
- Imports: a program imports what its command needs, so that preparing data needs no torch.

A library does not change its host program's environment, and offers all of its names: neither holds for others.
"""

import os
import sys
from pathlib import Path

_NAMES = (
    *("mola", "mola.exe", "mola-script.py"),
    *("preparation_scienceqa_data.py", "preparation_instruction_data.py"),
    *("mola_training.py", "mola_training_instruction.py", "evaluation_scienceqa.py"),
)


def is_own_program(program: str) -> bool:
    """Whether a process that was started as `program` is one of mola's own."""
    return Path(program).name in _NAMES


def prefer_passive_waiting() -> None:
    """Set `OMP_WAIT_POLICY=PASSIVE` if the user has not chosen."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


OWN_PROGRAM = is_own_program(sys.argv[0] if sys.argv else "")

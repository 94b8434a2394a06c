"""How the `mola` command waits for its threads on a shared CPU.

OpenMP threads wait for each other at barriers by spinning. When other programs hold the cores, a step of
one second can become a minute. Passive waiting cures that; it has to be set before torch is imported, and
only for the command: a library does not change its host program's environment.
"""

import os
import sys
from pathlib import Path


def prefer_passive_waiting(program: str) -> None:
    """Set `OMP_WAIT_POLICY=PASSIVE` if `program` is the mola command and the user has not chosen."""
    if Path(program).name in ("mola", "mola.exe", "mola-script.py"):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


prefer_passive_waiting(sys.argv[0] if sys.argv else "")

"""Processes that keep the cores busy while something is measured, and that never outlive it; who else does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_STAT = Path("/proc/stat")
# Ends by itself where nobody is left who could end it: after a SIGKILL or SIGTERM of its parent.
_LOOP = """
import os, sys
parent = int(sys.argv[1])
print("busy", flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_seconds() -> float | None:
    """Seconds that the cores of this machine have worked since it started, all processes together; None if unknown."""
    if not _STAT.exists():
        return None
    ticks = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, *_ = ticks
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def busy_neighbours(number: int) -> Iterator[list[int]]:
    """Plain Python loops, each in a process of its own, that are killed when the context ends, however it ends.

    Args:
        number: of processes; as many as cores leave none free.

    Yields:
        Their process ids; all of them run by then.

    Raises:
        RuntimeError: one of them did not start, or ended before the context did.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_one_neighbour()) for _ in range(number)]
        if any(process.stdout.readline() != b"busy\n" for process in processes):
            raise RuntimeError("A busy neighbour process did not start.")
        yield [process.pid for process in processes]
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("A busy neighbour process ended while something was measured beside it.")


@contextmanager
def _one_neighbour() -> Iterator[Any]:
    command = [sys.executable, "-I", "-S", "-c", _LOOP, str(os.getpid())]
    # Ctrl-C reaches it as well: its traceback would say nothing.
    process: Any = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

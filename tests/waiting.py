"""Waiting for other processes and threads: as long as a busy machine needs, but not for what hangs."""

import time

PATIENCE = 600  # seconds


def wait_until(condition, *processes):
    """Ask until the answer is true, and return it; it never will be if one of the processes has ended."""
    end = time.monotonic() + PATIENCE
    while not (answer := condition()):
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)
    return answer

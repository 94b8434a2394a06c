"""Waits for other processes and threads: as long as a busy machine needs, but not forever."""

import time

PATIENCE = 600  # seconds


def wait_until(condition, *processes):
    """Call `condition` until its result is true, and return the result; fail at once if a process has ended."""
    end = time.monotonic() + PATIENCE
    while not (result := condition()):
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)
    return result

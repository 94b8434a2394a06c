"""What every input must end in: success or one `MolaError`, soon, and without a lot of memory."""

import contextlib
import re
import resource
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import hypothesis

from mola import MolaError

MOST_SECONDS = 10.0  # of this process's own time, so that a busy machine is no failure
MOST_MEMORY = 1 << 30  # growth in bytes for one input
_HANGS_AFTER = 300

fuzz = hypothesis.settings.get_profile("fuzz")


class Hangs(BaseException):
    """No `Exception`: a reader that catches those must not catch this."""


def survives(reader, *arguments, **options):
    """The reader's result, or the MolaError that it raised; whatever else it raises, fails the test.

    A reader that takes too long is asked once more, as the first call of a process may import half a library.
    """
    result, seconds, growth = _observed(reader, *arguments, **options)
    if seconds >= MOST_SECONDS:
        _, seconds, _ = _observed(reader, *arguments, **options)
    assert seconds < MOST_SECONDS, f"{seconds:.1f} s"
    assert growth < MOST_MEMORY, f"{growth / 2**20:.0f} MiB"
    return result


def _observed(reader, *arguments, **options):
    """Result or MolaError, seconds of this process's own time, bytes that the process has grown."""
    before, start = _peak(anew=True), time.process_time()
    try:
        with _alarm():
            result = reader(*arguments, **options)
    except MolaError as error:
        result = error
    if isinstance(result, MolaError):
        assert str(result).strip()
        assert "Traceback" not in str(result)
    return result, time.process_time() - start, _peak() - before


def _peak(anew=False):
    """The most memory that this process has had, in bytes; `anew`: from now on, which Linux alone can tell."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if anew:
        with contextlib.suppress(OSError):  # where it is not allowed an earlier peak may hide one of now
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


@contextmanager
def _alarm():
    def hangs(*_):
        raise Hangs(f"no answer after {_HANGS_AFTER} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(_HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

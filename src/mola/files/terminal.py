"""Standard output: tables whole, also in a pipe or a file; what to do when nobody reads it."""

import os
import sys

from rich.console import Console

_NO_LIMIT = 1000  # columns; a table takes what it needs, and rich would assume 80 and cut cells


class OutputConsole(Console):
    """Rich's console on standard output; where nobody reads that any more it raises what `print` does."""

    def on_broken_pipe(self) -> None:
        """Rich itself would end the program without a word."""
        raise BrokenPipeError


def end_unread(name: str) -> int:
    """Say that nobody reads the output of the program `name` any more; returns its exit code, as shells have it."""
    print(f"{name}: nobody reads its output any more", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest at its end
    return 141


def table_console() -> Console:
    """A console as wide as the terminal; where there is none, wide enough for every table."""
    console = OutputConsole()
    return console if console.is_terminal else OutputConsole(width=_NO_LIMIT)

"""Standard output: tables whole, also in a pipe or a file; what to do when nobody reads it. A bar for long work."""

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_Item = TypeVar("_Item")
_NO_LIMIT = 1000  # columns; a table takes what it needs, and rich would assume 80 and cut cells


class OutputConsole(Console):
    """Rich's console on standard output; where nobody reads that any more it raises what `print` does."""

    def on_broken_pipe(self) -> None:
        """Rich itself would end the program without a word."""
        raise BrokenPipeError


def progress(items: Iterable[_Item], title: str, total: int | None = None) -> Iterable[_Item]:
    """The items, with a bar on standard error while they are worked on, where that is a terminal.

    Args:
        items: what is worked on.
        title: what is done.
        total: how many there are, where they do not say.
    """
    console = Console(stderr=True)
    return track(items, title, total, console=console, disable=not console.is_terminal)


def end_unread(name: str) -> int:
    """Say that nobody reads the output of the program `name` any more; returns its exit code, as shells have it."""
    print(f"{name}: nobody reads its output any more", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest at its end
    return 141


def table_console() -> Console:
    """A console as wide as the terminal; where there is none, wide enough for every table."""
    console = OutputConsole()
    return console if console.is_terminal else OutputConsole(width=_NO_LIMIT)

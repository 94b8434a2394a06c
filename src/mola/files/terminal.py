"""Tables on standard output, a progress bar on standard error, and a pipe whose reader has ended."""

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_Item = TypeVar("_Item")
_PIPE_WIDTH = 1000  # columns; rich would assume 80 for a pipe or a file and cut the cells of a wide table


class OutputConsole(Console):
    """Rich's console on standard output; raises `BrokenPipeError`, like `print`, if the reader of a pipe has ended."""

    def on_broken_pipe(self) -> None:
        """Raise the error again. Rich itself would exit with code 1."""
        raise BrokenPipeError


def make_table_console() -> Console:
    """A console as wide as the terminal; in a pipe or a file, as wide as any table."""
    console = OutputConsole()
    return console if console.is_terminal else OutputConsole(width=_PIPE_WIDTH)


def show_progress(items: Iterable[_Item], title: str, total: int | None = None) -> Iterable[_Item]:
    """Yield the items and show a progress bar on standard error, if standard error is a terminal.

    Args:
        items: the items to process.
        title: text before the bar.
        total: number of items, if `items` has no length.
    """
    console = Console(stderr=True)
    return track(items, title, total, console=console, disable=not console.is_terminal)


def close_output() -> int:
    """Discard further output after a `BrokenPipeError`; returns the exit code that shells use for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes standard output at exit
    return 141

"""Tables on standard output: whole, also in a pipe or a file."""

from rich.console import Console

_NO_LIMIT = 1000  # columns; a table takes what it needs, and rich would assume 80 and cut cells


def table_console() -> Console:
    """A console as wide as the terminal; where there is none, wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=_NO_LIMIT)

"""Tables on standard output: whole, also in a pipe or a file."""

from rich.console import Console

_NO_LIMIT = 1000  # columns; a table takes what it needs, and rich would assume 80 and cut cells


class OutputConsole(Console):
    """Rich's console on standard output; where nobody reads that any more the command line ends, see `mola.cli`."""

    def on_broken_pipe(self) -> None:
        """Rich itself would end the program without a word."""
        raise BrokenPipeError


def table_console() -> Console:
    """A console as wide as the terminal; where there is none, wide enough for every table."""
    console = OutputConsole()
    return console if console.is_terminal else OutputConsole(width=_NO_LIMIT)

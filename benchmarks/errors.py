"""How the benchmarks' commands report errors: one line on standard error, and the exit code 2."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from mola.errors import MolaError
from mola.files.terminal import close_output


def in_one_line(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A decorator for the `main` of a command: an error becomes one line that begins with the command's `name`."""

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*arguments: Any) -> int:
            try:
                code = main(*arguments)
                sys.stdout.flush()
                return code
            except BrokenPipeError:
                return close_output()
            except MolaError as error:
                print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
                return 2

        return run

    return decorate

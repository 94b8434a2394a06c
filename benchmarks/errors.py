"""Errors of the benchmarks' commands: one line on standard error, and the exit code 2."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from mola.errors import MolaError


def in_one_line(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate the `main` of the command `name`, which begins the line."""

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*arguments: Any) -> int:
            try:
                return main(*arguments)
            except MolaError as error:
                print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
                return 2

        return run

    return decorate

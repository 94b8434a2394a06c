"""How the benchmarks' commands report errors, and what they do if a signal ends a training."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mola.errors import MolaError
from mola.files.terminal import close_output

if TYPE_CHECKING:
    from mola import TrainResult


def in_one_line(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A decorator for the `main` of a command: an error is one line that begins with its `name`, and the code is 2."""

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


def finished(result: TrainResult) -> TrainResult:
    """The result of a training that no signal has ended, so that no study measures half a training.

    Raises:
        MolaError: the training was interrupted.
    """
    if result.status != "finished":
        raise MolaError(f"the training in {result.output_dir} was interrupted at step {result.steps}. Start it again.")
    return result

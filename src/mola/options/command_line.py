"""Command lines that a user can paste into a shell."""

import json
import shlex
from collections.abc import Mapping
from typing import Any


def command_line(name: str, options: Mapping[str, Any], *words: str) -> str:
    """The command `mola name` with the options that have a value other than False, followed by `words`."""
    flags = [
        word
        for key, value in options.items()
        if value
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    return shlex.join(["mola", name, *flags, *words])


def next_steps(*commands: str) -> str:
    """A heading, then one command per line."""
    return "\n".join(["Next:", *(f"  {command}" for command in commands)])

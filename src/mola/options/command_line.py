"""Command lines that a user can paste into a shell."""

import json
import shlex
from collections.abc import Mapping
from typing import Any


def command_line(name: str, options: Mapping[str, Any], *words: str) -> str:
    """The command `mola name` with `words`, followed by the options that have a value other than False."""
    flags = [
        word
        for key, value in options.items()
        if value
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    return shlex.join(["mola", name, *words, *flags])


def next_steps(*commands: str) -> str:
    """A heading, then one command per line."""
    return "\n".join(["Next:", *(f"  {command}" for command in commands)])

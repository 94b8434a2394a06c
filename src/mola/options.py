"""One field of an options dataclass: its default, and the text of `--help` and of the option tables."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help})

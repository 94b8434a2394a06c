"""What options dataclasses share: a field with its help text, and names between commas."""

import re
from dataclasses import field
from typing import Any

from mola.errors import MolaError


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help})


def names_between_commas(names: str | None) -> list[str] | str | None:
    """Module names from a comma-separated option; "all-linear" and regular expressions stay one text.

    Raises:
        MolaError: a name is empty.
    """
    if names is None or names.strip().lower() == "all-linear":
        return names and "all-linear"
    parts = [name.strip() for name in names.split(",")]
    if not all(parts):
        raise MolaError(f"`target_modules` must be names between commas, got {names!r}. Example: 'q_proj,v_proj'.")
    return parts if all(re.fullmatch(r"[\w.]+", part) for part in parts) else names

"""What options dataclasses share: a field with its help text, names between commas, mappings."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from mola.errors import MolaError
from mola.reading import parse_json


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


def mapping(name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """An option that holds a mapping: JSON text on the command line, a dict in Python; empty for None.

    Args:
        name: of the option, for messages.
        value: what was given.

    Raises:
        MolaError: no mapping, or a key occurs twice.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = parse_json(value, object_pairs_hook=lambda pairs: _different_keys(name, pairs))
        except MolaError:
            raise
        except ValueError as error:
            raise MolaError(
                f'`{name}` must be a mapping; on the command line as JSON, such as \'{{"key": "value"}}\': got '
                f"{value!r} ({error})."
            ) from error
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise MolaError(f"`{name}` must be a mapping with text keys: got {value!r}.")
    return dict(value)


def _different_keys(name: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Plain JSON would keep the last of two equal keys in silence."""
    counts = Counter(key for key, _ in pairs)
    for key in counts:
        if counts[key] > 1:
            raise MolaError(f"`{name}` holds the key {key!r} twice. Keep one of them.")
    return dict(pairs)


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str] | None = None) -> str | None:
    """The first name whose values differ; None if there is none.

    Args:
        old: values by name; one that is missing counts as None.
        new: values to compare with.
        names: what is compared, in this order; by default all names of both, sorted.
    """
    compared = sorted({*old, *new}) if names is None else names
    return next((name for name in compared if old.get(name) != new.get(name)), None)

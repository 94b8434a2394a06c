"""What options dataclasses share: fields with help texts, in groups; names between commas, mappings."""

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any

from mola.errors import MolaError
from mola.files.reading import first_repeated, parse_json

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with a help text and whatever else argparse shall know about its flag."""
    return field(default=default, metadata={"help": help, **more})


class Group(str):
    """A class variable of an options class that gives the options below it a heading."""


START = Group("start with these")


def options_by_group(options_class: Any) -> dict[str, list[Field]]:
    """Heading -> options, as a reader meets them: a class before its parents, what is required before the rest.

    Options above the first heading of their class are under "".
    """
    options = {each.name: each for each in fields(options_class) if each.init}
    groups: dict[str, list[Field]] = {}
    for parent in inspect.getmro(options_class):
        heading = ""
        for name in inspect.get_annotations(parent):
            value = vars(parent).get(name)
            if isinstance(value, Group):
                heading = value
            elif name in options:
                groups.setdefault(heading, []).append(options.pop(name))
    for group in groups.values():
        group.sort(key=lambda each: not (each.default is each.default_factory is MISSING))
    return groups


def paths_as_text(options: Any) -> None:
    """Make texts of the options that were given as `os.PathLike`: records of what was asked for are JSON."""
    for each in fields(options):
        value = getattr(options, each.name, None)
        if isinstance(value, os.PathLike):
            setattr(options, each.name, os.fspath(value))
        elif isinstance(value, (list, tuple)) and any(isinstance(item, os.PathLike) for item in value):
            setattr(options, each.name, [os.fspath(item) for item in value])


def names_between_commas(names: str | None, option: str = "target_modules") -> list[str] | str | None:
    """Module names from a comma-separated `option`; "all-linear" and regular expressions stay one text.

    Raises:
        MolaError: a name is empty, or it is no text.
    """
    if names is not None and not isinstance(names, str):
        raise MolaError(f"`{option}` must be one text, with names between commas like 'q_proj,v_proj': got {names!r}.")
    if names is None or names.strip().lower() == "all-linear":
        return names and "all-linear"
    parts = [name.strip() for name in names.split(",")]
    if not all(parts):
        raise MolaError(f"`{option}` must be names between commas, got {names!r}. Example: 'q_proj,v_proj'.")
    return parts if all(re.fullmatch(r"[\w.]+", part) for part in parts) else names


def list_between_commas(names: str | None, option: str) -> list[str] | None:
    """As `names_between_commas`, for options of which PEFT takes lists: a text would be read letter by letter."""
    split = names_between_commas(names, option)
    return [split] if isinstance(split, str) else split


def named_mappings(name: str, value: Mapping[str, Any] | str | None, example: str) -> dict[str, dict[str, Any]]:
    """An option that gives names to several sets of options; each name becomes a part of a folder's name.

    Its value is a mapping from names to mappings, or to None for an empty one; text as in `mapping`. `example` is a
    right one, for messages.

    Raises:
        MolaError: it is empty, a name is none that every file system takes, or a value is no mapping.
    """
    entries = mapping(name, value)
    if not entries:
        raise MolaError(
            f"`{name}` must name at least one, such as {example}: it is empty. Give it in the recipe, or as JSON with "
            f"--{name}."
        )
    for key, values in entries.items():
        if not _NAME.fullmatch(key):
            raise MolaError(
                f"`{name}` must have names made of letters, digits, '_', '.' and '-', which folders can have: got "
                f"{key!r}. Rename it."
            )
        if values is not None and not (isinstance(values, Mapping) and all(isinstance(each, str) for each in values)):
            raise MolaError(f"`{name}.{key}` must be a mapping from options to values: got {values!r}.")
    return {key: dict(values or {}) for key, values in entries.items()}


def mapping(name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """An option that holds a mapping: JSON text on the command line, a dict in Python; empty for None.

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
    if (key := first_repeated(key for key, _ in pairs)) is not None:
        raise MolaError(f"`{name}` holds the key {key!r} twice. Keep one of them.")
    return dict(pairs)


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str] | None = None) -> str | None:
    """The first of `names` whose values differ; None if there is none. A missing value counts as None.

    By default all names of both are compared, sorted.
    """
    compared = sorted({*old, *new}) if names is None else names
    return next((name for name in compared if old.get(name) != new.get(name)), None)


def check_seed(seed: int) -> None:
    """Refuse a `seed` that generators of torch do not take."""
    if not 0 <= seed < 2**63:
        raise MolaError(f"`seed` must be a whole number from 0 to 2^63 - 1: got {seed}.")


def check_positive(**values: int | None) -> None:
    """Refuse counts below 1; None passes."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise MolaError(f"`{name}` must be at least 1: got {value}.")

"""Fields of options dataclasses, their groups, and options whose text holds names or a mapping."""

import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import check_new_file, check_new_folder
from mola.files.reading import first_repeated

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def option(default: Any, help: str, name: str | None = None, **more: Any) -> Any:
    """A dataclass field with a help text.

    Args:
        default: the default value.
        help: the text.
        name: its name in flags, recipes and help texts, if the field is called differently; see `OptionsParser`.
        more: arguments of argparse's `add_argument` for the flag.
    """
    if name is not None:
        more["aliases"] = [f"--{name.replace('_', '-')}", f"--{name}"] if "_" in name else [f"--{name}"]
    return field(default=default, metadata={"help": help, **more})


def required(help: str, **more: Any) -> Any:
    """A field of which a value must be given, on the command line and in Python; see `check_required`.

    Its default is None, so that it may follow a field with a default.
    """
    return option(None, help, required=True, **more)


def shown_name(each: Field) -> str:
    """The name of a field in help texts."""
    aliases: list[str] = each.metadata.get("aliases", [each.name])
    return aliases[-1].removeprefix("--")


def with_shown_names(message: str, options_class: Any) -> str:
    """A message in which the fields in back-ticks have the names that help texts show."""
    names = {each.name: shown_name(each) for each in fields(options_class)}
    return re.sub(r"`(\w+)`", lambda found: f"`{names.get(found[1], found[1])}`", message)


def is_required(each: Field) -> bool:
    """Whether a field has no default, or is made by `required`."""
    return each.default is each.default_factory is MISSING or bool(each.metadata.get("required"))


def check_required(options: Any) -> None:
    """Raise if a field that is made by `required` has no value."""
    for each in fields(options):
        if is_required(each) and getattr(options, each.name) is None:
            raise MolaError(f"`{each.name}` must be given.")


def check_results(options: Any) -> None:
    """Check before long work that results can be written: the fields whose metadata `writes` is "file" or "folder".

    Raises:
        MolaError: a file exists and `overwrite` is not set, a folder has files, or the place cannot be written to.
    """
    for each in fields(options):
        path, kind = getattr(options, each.name), each.metadata.get("writes")
        if kind == "file" and path not in (None, "-"):  # "-" is standard output
            check_new_file(each.name, path, options.overwrite)
        elif kind == "folder" and path is not None:
            check_new_folder(each.name, path)


class Group(str):
    """A class variable of an options class: the heading of the options below it."""


START = Group("start with these")


def group_options(options_class: Any) -> dict[str, list[Field]]:
    """Heading -> options, in the order of the help text: a class before its parents, required options first.

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
        group.sort(key=lambda each: not is_required(each))
    return groups


def convert_paths(options: Any) -> None:
    """Replace each `os.PathLike` in an options object by a string, because options are recorded as JSON."""
    for each in fields(options):
        value = getattr(options, each.name, None)
        if isinstance(value, os.PathLike):
            setattr(options, each.name, os.fspath(value))
        elif isinstance(value, (list, tuple)) and any(isinstance(item, os.PathLike) for item in value):
            setattr(options, each.name, [os.fspath(item) for item in value])


def split_names(names: str | None, option: str = "target_modules") -> list[str] | str | None:
    """Split module names at the commas; "all-linear" and a regular expression stay one string.

    Raises:
        MolaError: a name is empty.
    """
    if names is None or names.strip().lower() == "all-linear":
        return names and "all-linear"
    parts = [name.strip() for name in names.split(",")]
    if not all(parts):
        raise MolaError(f"`{option}` must be names between commas, got {names!r}. Example: 'q_proj,v_proj'.")
    return parts if all(re.fullmatch(r"[\w.]+", part) for part in parts) else names


def split_to_list(names: str | None, option: str) -> list[str] | None:
    """Like `split_names`, but always a list, for PEFT options that would read a string letter by letter."""
    split = split_names(names, option)
    return [split] if isinstance(split, str) else split


def parse_mapping(name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The option `name`, whose value is a mapping: JSON text on the command line, or a dict in Python. None gives {}.

    Raises:
        MolaError: the value is not a mapping with text keys, or a key occurs twice.
    """

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (key := first_repeated(key for key, _ in pairs)) is not None:
            raise MolaError(f"`{name}` holds the key {key!r} twice. Keep one of them.")
        return dict(pairs)

    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=to_dict)
        except json.JSONDecodeError as error:
            raise MolaError(
                f'`{name}` must be a mapping; on the command line as JSON, such as \'{{"key": "value"}}\': got '
                f"{value!r} ({error})."
            ) from error
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise MolaError(f"`{name}` must be a mapping with text keys: got {value!r}.")
    return dict(value)


def parse_named_mappings(name: str, value: Mapping[str, Any] | str | None, example: str) -> dict[str, dict[str, Any]]:
    """The option `name`, which maps names to sets of options; a value of None stands for no options.

    Args:
        name: the option.
        value: as in `parse_mapping`. Each key becomes part of a folder name.
        example: a correct value as JSON, for messages.

    Raises:
        MolaError: no name is given, a name has a character that is not allowed in folder names, or a value is no
            mapping.
    """
    entries = parse_mapping(name, value)
    if not entries:
        raise MolaError(f"`{name}` must not be empty. Set it in the recipe, or as JSON: --{name} '{example}'.")
    for key, values in entries.items():
        if not is_folder_name(key):
            raise MolaError(f"`{name}` must have names of letters, digits, '_', '.' and '-': got {key!r}. Rename it.")
        if values is not None and not isinstance(values, Mapping):
            raise MolaError(f"`{name}.{key}` must be a mapping from options to values: got {values!r}.")
    return {key: dict(values or {}) for key, values in entries.items()}


def is_folder_name(name: str) -> bool:
    """Whether a name has only characters that are allowed in folder names, and no separator of folders."""
    return _FOLDER_NAME.fullmatch(name) is not None


def find_difference(old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str] | None = None) -> str | None:
    """The first of `names` (by default all keys, sorted) whose values differ, or None; missing values count as None."""
    compared = sorted({*old, *new}) if names is None else names
    return next((name for name in compared if old.get(name) != new.get(name)), None)


def check_seed(seed: int) -> None:
    """Raise for a `seed` outside the range that torch's generators accept."""
    if not 0 <= seed < 2**63:
        raise MolaError(f"`seed` must be a whole number from 0 to 2^63 - 1: got {seed}.")


def check_positive(**values: int | None) -> None:
    """Raise for a value below 1; None is allowed."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise MolaError(f"`{name}` must be at least 1: got {value}.")

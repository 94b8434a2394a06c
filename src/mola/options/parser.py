"""An argument parser whose flags are the fields of a dataclass, with the rules of Transformers' `HfArgumentParser`.

Transformers takes seconds to import, and `--help` or a wrong flag needs nothing else of it.
"""

import inspect
import re
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from mola.errors import MolaError
from mola.options.fields import parse_mapping

_SPELLINGS = re.compile(r"--[\w-]+(/--[\w-]+)+")  # as argparse names a flag
_NAMES_OF_TRAINER = {"output_dir", "per_device_train_batch_size"}  # those that have another name in mola
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class RaisingParser(ArgumentParser):
    """A parser that raises `MolaError` where argparse would end the program; it has no `--help` of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        """Raise a `MolaError`; of the spellings of a flag, the message keeps the last one without dashes inside."""
        message = _SPELLINGS.sub(lambda found: last_without_dashes(found[0].split("/")), message)
        raise MolaError(f"{message.rstrip('.')}. Run the command with --help for the list of options.")


class OptionsParser(RaisingParser):
    """A parser for the fields of one dataclass.

    The flag of a field with another shown name has this name only. Commands that train also accept every name of
    Transformers' `TrainingArguments`.

    Attributes:
        options_class: the dataclass.
        flags: each spelling of a flag, such as `--base_model` and `--base-model`, and its action.
        kinds: the type of each field.
    """

    def __init__(self, options_class: Any, prog: str | None = None, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description)
        self.options_class = options_class
        self.flags: dict[str, Action] = {}
        self.kinds: dict[str, Any] = get_type_hints(options_class)
        for each in fields(options_class):
            if each.init:
                self._add_field(each, self.kinds[each.name])

    def add_argument(self, *names: Any, **settings: Any) -> Action:
        """Add a flag, see argparse; also to `flags`."""
        action = super().add_argument(*names, **settings)
        self.flags |= dict.fromkeys(action.option_strings, action)
        return action

    def options_of(self, values: Any) -> Any:
        """An object of the dataclass from the result of `parse_args`."""
        names = [each.name for each in fields(self.options_class) if each.init]
        return self.options_class(**{name: getattr(values, name) for name in names})

    def _add_field(self, field: Field, kind: Any) -> None:
        settings = dict(field.metadata)
        names = settings.pop("aliases", [])
        settings.pop("writes", None)
        if not names or (field.name in _NAMES_OF_TRAINER and self.kinds.keys() >= _NAMES_OF_TRAINER):
            names = [*_spellings(field.name), *names]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        kind = _kind_of_value(kind)
        self.add_argument(*names, dest=field.name, **_settings(kind, default, settings))
        if field.default is True and kind in (bool, bool | None):
            self.add_argument(
                *_spellings(f"no_{field.name}"),
                action="store_false",
                dest=field.name,
                default=False,
                help=settings.get("help"),
            )


def last_without_dashes(flags: Sequence[str]) -> str:
    """The spelling of a flag in messages and help texts."""
    return [flag for flag in flags if "-" not in flag[2:]][-1]


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _kind_of_value(kind: Any) -> Any:
    """The part of a union that a word is converted to; `bool | None` stays, as its default may be None."""
    parts = get_args(kind) if get_origin(kind) not in (list, dict, Literal) else ()
    if not parts or {bool, type(None)} <= {*parts}:
        return kind
    if type(None) in parts:
        return parts[0] if parts[1] is type(None) else parts[1]
    return parts[0] if parts[1] is str else parts[1]


def _settings(kind: Any, default: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `add_argument` for a value of this kind."""
    settings: dict[str, Any] = dict(more)
    if default is not MISSING:
        settings["default"] = default
    else:
        settings["required"] = True
    if get_origin(kind) is Literal or (inspect.isclass(kind) and issubclass(kind, Enum)):
        choices = get_args(kind) or [each.value for each in kind]
        return {**settings, "choices": choices, "type": _choice_among(choices)}
    if kind in (bool, bool | None):
        settings["type"] = _true_or_false
        if kind is bool or default not in (None, MISSING):  # the flag alone means true
            settings |= {"default": False if default is MISSING else default, "nargs": "?", "const": True}
            settings.pop("required", None)
        return settings
    if get_origin(kind) is list:
        if isinstance(default, str):  # argparse would convert it like a word
            settings["default"] = None
        return {**settings, "type": get_args(kind)[0], "nargs": "+"}
    # argparse cannot call dict[str, bool] with a text
    return {**settings, "type": _json_mapping if get_origin(kind) is dict else kind}


def _choice_among(choices: Any) -> Callable[[str], Any]:
    by_text = {str(choice): choice for choice in choices}
    return lambda text: by_text.get(text, text)


def _true_or_false(text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in _TRUE


def _json_mapping(text: str) -> dict[str, Any]:
    return parse_mapping("", text)


_json_mapping.__name__ = "JSON mapping"  # argparse shows the name in messages

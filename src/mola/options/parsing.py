"""Options of a command from its flags and, with `--config`, a YAML recipe.

Flags are those of the command's options dataclass, with underscores or dashes. A recipe gives options by
the same names; flags win. Unknown flags and keys are refused before anything else happens. `~/` at the start of a
value is the home folder: shells leave it where it stands after `=`, and recipes have no shell.
"""

import difflib
import json
import os
import re
from argparse import Action, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, NoReturn, get_origin, get_type_hints

from transformers import HfArgumentParser

from mola.errors import MolaError
from mola.options.fields import mapping
from mola.options.help import ShowHelp
from mola.options.recipes import read_recipe


def parse(
    options_class: Any,
    arguments: Sequence[str],
    *,
    prog: str,
    summary: str = "",
    positional: str | None = None,
    bare_no: bool = False,
) -> Any:
    """Options from flags and, with `--config`, a YAML recipe.

    Args:
        options_class: dataclass of options.
        arguments: the words after the command.
        prog: how the command is called, for the help text.
        summary: one line for the help text.
        positional: option that a first word without dashes sets; if it is a list, all words before the first flag.
        bare_no: accept `--noflag` for `--flag=false`.

    Raises:
        MolaError: a flag or its value is wrong, the recipe is unreadable or has unknown keys, or
            options contradict each other.
        SystemExit: after `--help`.
    """
    arguments, recipe = _take_config(list(arguments))
    if bare_no:
        arguments = _without_bare_no(arguments, options_class)
    parser, flags = _make_parser(options_class, prog, summary)
    if positional and arguments and not arguments[0].startswith("-"):
        takes_more = flags[f"--{positional}"].nargs == "+"
        end = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments)) if takes_more else 1
        arguments = [f"--{positional}", *arguments[:end], *arguments[end:]]
    config = parser.add_argument("--config", metavar="RECIPE.yaml", help="Read options from a YAML file; flags win.")
    flags |= {"--config": config}
    # Before argparse does anything: a misspelt flag is the likely reason for whatever else is missing.
    for word in arguments:
        if word.startswith("--") and " " not in word and word.partition("=")[0] not in flags:
            raise MolaError(_unknown(word.partition("=")[0], flags))
    if arguments and not arguments[0].startswith("-"):  # which a list at the end of a recipe would take
        raise MolaError(_unknown(arguments[0], flags))
    _refuse_lists_given_twice(arguments, flags, options_class)
    if recipe is not None:
        values = read_recipe(recipe)
        arguments = _recipe_flags(values, recipe, parser, flags, get_type_hints(options_class)) + arguments
    arguments = _with_home(arguments)
    _, stray = parser.parse_known_args(arguments)
    if stray:
        raise MolaError(_unknown(stray[0], flags))
    try:
        options, *_ = parser.parse_args_into_dataclasses(
            args=arguments, look_for_args_file=False, return_remaining_strings=True
        )
    except MolaError:
        raise
    except json.JSONDecodeError as error:
        raise MolaError(f"an option that takes a mapping needs it as JSON, got {error.doc!r}: {error}.") from error
    except (ValueError, TypeError, ImportError) as error:  # TrainingArguments' own checks
        raise MolaError(str(error)) from error
    return options


def convert(options_class: Any, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Some options of a dataclass, given as a mapping, checked and converted as flags are.

    Args:
        options_class: dataclass of options, none of them required.
        values: option name -> value as YAML or JSON has it.
        source: where the values are from, for messages.

    Returns:
        Field name -> value, of the options given only.

    Raises:
        MolaError: a name is unknown or a value does not fit.
    """
    parser, flags, types = _converter(options_class)
    words = _recipe_flags(values, source, parser, flags, types)
    options = parser.parse_args(_with_home(words))
    names = [flags[f"--{key}"].dest for key in values]
    return {name: getattr(options, name) for name in names}


_FLAG = re.compile(r"--[\w-]+(=|$)")
_FREE_TEXT = ("prompt", "instruction", "input")
_HOME = re.compile(r"(?:^|(?<=[=,]))~(?=/)")  # also in NAME=PATH and between commas


def _with_home(arguments: Sequence[str]) -> list[str]:
    """The words with the home folder in place of `~`, but in options that hold any text."""
    words, name = [], ""
    for word in arguments:
        flag, sign, value = word.partition("=") if _FLAG.match(word) else ("", "", word)
        name = flag.lstrip("-").replace("-", "_") or name
        text = value if name in _FREE_TEXT else _HOME.sub(lambda _: os.path.expanduser("~"), value)
        words.append(f"{flag}{sign}{text}")
    return words


@cache  # a comparison converts its options many times, and several hundred flags take 10 ms to make
def _converter(options_class: Any) -> tuple[HfArgumentParser, dict[str, Action], dict[str, Any]]:
    return *_make_parser(options_class), get_type_hints(options_class)


def _make_parser(
    options_class: Any, prog: str | None = None, summary: str | None = None
) -> tuple[HfArgumentParser, dict[str, Action]]:
    """A parser that raises errors, and its flags."""
    parser = HfArgumentParser(options_class, prog=prog, description=summary, allow_abbrev=False, add_help=False)
    parser.error = _refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if get_origin(action.type) is dict:  # dict[str, bool] makes nothing of a text
            action.type = _json_mapping
    text = "Show this help; all: every option."
    parser.add_argument("-h", "--help", action=ShowHelp, nargs="?", choices=["all"], metavar="[all]", help=text)
    return parser, {option: action for action in parser._actions for option in action.option_strings}


def _json_mapping(text: str) -> dict[str, Any]:
    return mapping("", text)


_json_mapping.__name__ = "JSON mapping"  # so argparse calls it


def _without_bare_no(arguments: Sequence[str], options_class: Any) -> list[str]:
    switches = [name for name, kind in get_type_hints(options_class).items() if kind is bool]
    spelled = {f"--no{name}": f"--{name}=false" for name in switches}
    return [spelled.get(word, word) for word in arguments]


def _refuse(message: str) -> NoReturn:
    """Instead of argparse's error, which prints every flag there is first."""
    raise MolaError(f"{message.rstrip('.')}. Run the command with --help for the list of options.")


def _refuse_lists_given_twice(arguments: Sequence[str], flags: Mapping[str, Action], options_class: Any) -> None:
    """The second would be there instead of the first."""
    added_up = [each.name for each in fields(options_class) if each.metadata.get("action") == "extend"]
    given: set[str] = set()
    for word in arguments:
        action = flags.get(word.partition("=")[0]) if word.startswith("--") else None
        if action is None or action.nargs != "+" or action.dest in added_up:
            continue
        if action.dest in given:
            raise MolaError(
                f"`{action.dest}` must be given once, with all its values after it: got a second "
                f"{word.partition('=')[0]}."
            )
        given.add(action.dest)


def _unknown(word: str, flags: Mapping[str, Action]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag. Write every option as --flag value."
    # Every flag is there with underscores and with dashes; one of the two is enough of a hint.
    names = [name for name in flags if "-" not in name.removeprefix("--")]
    close = difflib.get_close_matches(word.replace("-", "_").replace("_", "-", 2), names, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"there is no flag {word}.{hint} Run the command with --help for the list."


def _take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="", action="append", default=[])
    found, rest = parser.parse_known_args(arguments)
    if "" in found.config:
        raise MolaError("`--config` needs the name of a YAML file after it.")
    if len(found.config) > 1:
        raise MolaError(f"`--config` must be given once: got {', '.join(found.config)}. Put them into one file.")
    for place, word in enumerate(arguments):
        after = place + 2 if word == "--config" else place + 1 if word.startswith("--config=") else len(arguments)
        if place and after < len(arguments) and not arguments[after].startswith("-"):  # a list before it would take it
            raise MolaError(_unknown(arguments[after], {}))
    return rest, next(map(os.path.expanduser, found.config), None)


def _recipe_flags(
    values: Mapping[str, Any],
    recipe: str,
    parser: ArgumentParser,
    flags: Mapping[str, Action],
    types: Mapping[str, Any],
) -> list[str]:
    """A recipe's values as flags, so that argparse checks and converts them like any others."""
    arguments: list[str] = []
    given: set[str] = set()
    for key, value in values.items():
        flag = f"--{key}"
        if flag not in flags or key in ("config", "help"):
            close = difflib.get_close_matches(key, [name.removeprefix("--") for name in flags], n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise MolaError(f"`{key}` in {recipe} is no option of this command.{hint} Run it with --help for the list.")
        action = flags[flag]
        if action.dest in given:
            raise MolaError(
                f"`{key}` is in {recipe} twice, with dashes and with underscores. Leave one of the two out."
            )
        given.add(action.dest)
        if value is None:
            if type(None) not in getattr(types.get(action.dest), "__args__", ()):
                raise MolaError(f"`{key}` in {recipe} needs a value: it is empty. Fill it in or leave the line out.")
            parser.set_defaults(**{action.dest: None})
        elif isinstance(value, list) and action.nargs == "+":
            arguments += [flag, *(_recipe_text(item) for item in value)]
        else:
            arguments.append(f"{flag}={_recipe_text(value)}")
    return arguments


def _recipe_text(value: Any) -> str:
    """A recipe's value as one would write it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        try:
            return json.dumps(value)
        except TypeError as error:  # YAML has dates
            raise MolaError(
                f"a recipe's mapping must hold text, numbers and truth values ({error}): quote it."
            ) from error
    if isinstance(value, list):
        text = ",".join(_recipe_text(item) for item in value)
        is_number = len(value) == 1 and isinstance(value[0], int) and not isinstance(value[0], bool)
        return f"{text}," if is_number else text  # one number: not its digits
    return getattr(value, "written", str(value))

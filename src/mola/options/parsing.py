"""Read the options of a command from flags and a YAML recipe.

The flags of a command are the fields of its options dataclass, written with underscores or dashes. A recipe sets
options by the same names; flags win. `~/` at the start of a value stands for the home folder.
"""

import difflib
import json
import os
import re
from argparse import Action
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml

from mola.errors import MolaError
from mola.files.reading import parse_yaml
from mola.options.help import ShowHelp, shown_flag
from mola.options.parser import OptionsParser, RaisingParser

_FLAG = re.compile(r"--[\w-]+(=|$)")
_HOME = re.compile(r"(?:^|(?<=[=,]))~(?=/)")  # a `~` at the start of a value, after `=` (NAME=PATH) or after a comma
_FREE_TEXT = ("prompt", "instruction", "input")  # options in which ~ is left unchanged

# Name of an option in other programs -> mola's names for it; the first one that a command has counts.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lora_r", "lora_rank", "rank"), ("r",)),
    "lr": ("learning_rate",),
    **dict.fromkeys(("micro_batch_size", "train_batch_size"), ("batch_size",)),
    **dict.fromkeys(("epochs", "num_epochs"), ("num_train_epochs",)),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len"), ("cutoff_len", "max_new_tokens")),
    "max_tokens": ("max_new_tokens",),
    **dict.fromkeys(("out", "out_dir", "output_dir", "output_file", "output_path", "save_path"), ("output",)),
    "overwrite_output_dir": ("overwrite",),
    **dict.fromkeys(("model", "model_id", "model_name", "model_name_or_path"), ("base_model",)),
    **dict.fromkeys(("dataset", "dataset_name", "data_path", "train_file"), ("data",)),
    **dict.fromkeys(
        ("adapter_path", "adapter_name_or_path", "lora_path", "peft_model"), ("adapter", "source", "run_dir")
    ),
    **dict.fromkeys(("n_experts", "experts", "number_experts"), ("num_experts",)),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token"), ("top_k",)),
    "lora_target_modules": ("target_modules",),
    "val_set_size": ("validation_size",),
    "grad_accum_steps": ("gradient_accumulation_steps",),
    "torch_dtype": ("dtype",),
}


def parse(
    options_class: Any,
    arguments: Sequence[str],
    *,
    prog: str,
    summary: str = "",
    positional: str | None = None,
    further: str | None = None,
    accept_noflag: bool = False,
    read: Callable[[str], Mapping[str, Any]] | None = None,
) -> Any:
    """Options from flags and, with `--config`, a YAML recipe.

    Args:
        options_class: dataclass of options.
        arguments: the words after the command.
        prog: name of the command, for the help text.
        summary: one line for the help text.
        positional: option that the first word sets if it has no dashes; a list option gets all words before the first
            flag.
        further: list option that the words after the first one set, up to the first flag.
        accept_noflag: accept `--noflag` for `--flag=false`.
        read: reads the recipe; default: `read_recipe`.

    Raises:
        MolaError: a flag or its value is wrong, the recipe is unreadable or has unknown keys, or
            options contradict each other.
        SystemExit: after `--help`.
    """
    arguments, parser = list(arguments), OptionsParser(options_class, prog, summary)
    flags = parser.flags
    if accept_noflag:
        spelled = {f"--no{name}": f"--{name}=false" for name, kind in parser.kinds.items() if kind is bool}
        arguments = [spelled.get(word, word) for word in arguments]
    parser.usage = _usage(prog, [flags[f"--{name}"] for name in (positional, further) if name])
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Read options from a YAML file; flags win.")
    text = "Show this help; all: every option."
    parser.add_argument("-h", "--help", action=ShowHelp, nargs="?", choices=["all"], metavar="[all]", help=text)
    if positional and arguments and not arguments[0].startswith("-"):
        action = flags[f"--{positional}"]
        is_word = [not word.startswith("-") for word in arguments]
        end = [*is_word, False].index(False) if action.nargs == "+" else 1
        if not _adds_up(action) and any(flags.get(word.partition("=")[0]) is action for word in arguments[end:]):
            raise MolaError(f"`{positional}` must be given once: got the first word {arguments[0]!r} and a flag too.")
        if further and len(arguments) > 1 and not arguments[1].startswith("-"):
            arguments.insert(1, f"--{further}")
        arguments = [f"--{positional}", *arguments]
    _check_words(arguments, flags)
    recipe = _find_recipe(arguments)
    if recipe is not None:
        arguments = _flags_of_mapping((read or read_recipe)(recipe), recipe, parser) + arguments
    values, stray = parser.parse_known_args(_expand_home(arguments))
    if stray:
        raise MolaError(_unknown(stray[0], flags))
    try:
        return parser.options_of(values)
    except (ValueError, TypeError, ImportError) as error:  # raised by TrainingArguments
        raise error if isinstance(error, MolaError) else MolaError(str(error)) from error


def convert(options_class: Any, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Some options of a dataclass, given as a mapping, checked and converted like flags.

    Args:
        options_class: dataclass of options, none of them required.
        values: option name -> value as read from YAML or JSON.
        source: where the values are from, for messages.

    Returns:
        Field name -> value, for the given options only.

    Raises:
        MolaError: a name is unknown or a value does not fit.
    """
    parser = _converter(options_class)
    words = _flags_of_mapping(values, source, parser)
    options = parser.parse_args(_expand_home(words))
    names = [parser.flags[f"--{key}"].dest for key in values]
    return {name: getattr(options, name) for name in names}


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Options in a YAML recipe, by name.

    A single value, and each value of a list, is kept as the text in the file, so that the type of the option decides
    what `2468`, `007`, `no` or `3e-4` means. An empty value is None. The values in a mapping are parsed by YAML.

    Raises:
        MolaError: the file cannot be read, is not YAML, or does not hold a mapping from names to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = parse_yaml(text)
    except OSError as error:
        raise MolaError(f"`config` cannot be read: {error}.") from error
    except ValueError as error:
        raise MolaError(f"`config` is not YAML: {os.fspath(path)!r}: {error}. Correct the file.") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        found = ", ".join(map(str, values)) if isinstance(values, list) else values
        raise MolaError(
            f"`config` must be a mapping from option names to values: {os.fspath(path)!r} holds {found!r:.80}."
        )
    texts = yaml.load(text, yaml.BaseLoader)
    for name, value in values.items():
        written = texts.get(name)
        is_text_list = isinstance(written, list) and all(isinstance(item, str) for item in written)
        if value is not None and (isinstance(written, str) or is_text_list):
            values[name] = written
    return values


def _find_recipe(arguments: Sequence[str]) -> str | None:
    """The path after `--config`, or None."""
    parser = RaisingParser()
    parser.add_argument("--config", action="append", default=[])
    recipes = parser.parse_known_args(arguments)[0].config
    if len(recipes) > 1:
        raise MolaError(f"`--config` must be given once: got {', '.join(recipes)}. Put them into one file.")
    return os.path.expanduser(recipes[0]) if recipes else None


@cache  # `mola compare` converts options many times, and making several hundred flags takes 10 ms
def _converter(options_class: Any) -> OptionsParser:
    return OptionsParser(options_class)


def _usage(prog: str, positional: Sequence[Action]) -> str:
    words = [prog]
    for action in positional:
        word = str(action.metavar or action.dest.removesuffix("_dir").upper()) + " ..." * (action.nargs == "+")
        words.append(word if action.required else f"[{word}]")
    return " ".join([*words, "[--config RECIPE.yaml]", "[--flag value ...]"])


def _check_words(arguments: Sequence[str], flags: Mapping[str, Action]) -> None:
    """Raise for an unknown flag, and for a list that is given twice.

    argparse would complain about missing options first, and would keep the second list only.
    """
    lists: set[str] = set()
    for word in arguments:
        flag = word.partition("=")[0]
        if not word.startswith("--") or " " in word:
            continue
        if flag not in flags:
            raise MolaError(_unknown(flag, flags))
        action = flags[flag]
        if action.dest in lists:
            raise MolaError(f"`{action.dest}` must be given once, with all its values after it: got a second {flag}.")
        if action.nargs == "+" and not _adds_up(action):
            lists.add(action.dest)
    if arguments and not arguments[0].startswith("-"):  # the word would become part of a list at the end of a recipe
        raise MolaError(_unknown(arguments[0], flags))


def _adds_up(action: Action) -> bool:
    """Whether the values of a flag that is given several times add up."""
    return type(action).__name__ == "_ExtendAction"


def _unknown(word: str, flags: Mapping[str, Action]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag. Write every option as --flag value."
    if own := _own_name(word.removeprefix("--"), flags):
        return f"there is no flag {word}: mola calls it --{own}."
    names = {shown_flag(action) for action in flags.values()}
    close = difflib.get_close_matches(word.replace("-", "_").replace("_", "-", 2), names, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"there is no flag {word}.{hint} Run the command with --help for the list."


def _own_name(name: str, flags: Mapping[str, Action]) -> str | None:
    """The flag's name for a field of another name, or for an option of another program, if the command has it."""
    name = name.replace("-", "_")
    shown = [shown_flag(action).removeprefix("--") for action in flags.values() if action.dest == name]
    return next((each for each in (*shown, *_SYNONYMS.get(name, ())) if f"--{each}" in flags), None)


def _expand_home(arguments: Sequence[str]) -> list[str]:
    """Replace `~` by the home folder; a shell does not do so after `=`."""
    words, name = [], ""
    for word in arguments:
        flag, sign, value = word.partition("=") if _FLAG.match(word) else ("", "", word)
        name = flag.lstrip("-").replace("-", "_") or name
        text = value if name in _FREE_TEXT else _HOME.sub(lambda _: os.path.expanduser("~"), value)
        words.append(f"{flag}{sign}{text}")
    return words


def _flags_of_mapping(values: Mapping[str, Any], source: str, parser: OptionsParser) -> list[str]:
    """The values of a recipe as flags, so that argparse checks and converts both in the same way."""
    arguments: list[str] = []
    given: set[str] = set()
    flags = parser.flags
    for key, value in values.items():
        flag = f"--{key}"
        if flag not in flags or key in ("config", "help"):
            names = {shown_flag(action).removeprefix("--") for action in flags.values()}
            close = difflib.get_close_matches(key, names, n=1)
            own = _own_name(key, flags)
            hint = f" mola calls it `{own}`." if own else f" Did you mean `{close[0]}`?" if close else ""
            raise MolaError(f"`{key}` in {source} is no option of this command.{hint} Run it with --help for the list.")
        action = flags[flag]
        if action.dest in given:
            raise MolaError(f"`{key}` is in {source} twice, in two spellings. Remove one of the two.")
        given.add(action.dest)
        if value is None:
            if type(None) not in get_args(parser.kinds.get(action.dest)):
                raise MolaError(f"`{key}` in {source} needs a value: it is empty. Fill it in or remove the line.")
            parser.set_defaults(**{action.dest: None})
        elif isinstance(value, list) and action.nargs == "+":
            arguments += [flag, *map(_flag_text, value)]
        else:
            arguments.append(f"{flag}={_flag_text(value)}")
    return arguments


def _flag_text(value: Any) -> str:
    """A YAML value as written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        text = ",".join(map(_flag_text, value))
        # The comma marks a list: `16` alone would be refused.
        return f"{text}," if len(value) == 1 and text.isdecimal() else text
    return str(value)

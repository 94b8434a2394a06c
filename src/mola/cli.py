"""`mola <command>`: finds the command, turns flags and a YAML recipe into its options, runs it.

Flags are those of the command's options dataclass, with underscores or dashes. `--config RECIPE.yaml`
gives options by the same names; flags on the command line win. Unknown flags and keys are refused
before anything else happens. Wrong input ends with one line and exit code 2.
"""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mola._version import __version__
from mola.errors import MolaError


class Command(NamedTuple):
    """Where a command lives: `module.options` is its dataclass, `module.main` runs it."""

    module: str
    options: str
    summary: str


COMMANDS = {
    "prepare": Command("mola.data.prepare", "PrepareOptions", "turn a data set into instructions and answers"),
    "train": Command("mola.train", "TrainOptions", "fine-tune a mixture of LoRA experts"),
    "evaluate": Command("mola.evaluate", "EvaluateOptions", "accuracy on a test file"),
    "generate": Command("mola.generate", "GenerateOptions", "answer one prompt, or one line after the other"),
    "plan": Command("mola.plan", "PlanOptions", "parameters and cost of an allocation, without loading weights"),
    "quickstart": Command("mola.quickstart", "QuickstartOptions", "the whole way once, on a small real model"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `mola` command.

    Returns:
        The exit code: 0, 2 for wrong input, 130 after an interruption.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"mola {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"mola: error: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(name, rest)


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one command; see `main`."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mola").setLevel(logging.INFO)
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
        options = parse(getattr(module, command.options), arguments, prog=f"mola {name}", summary=command.summary)
        return module.main(options)
    except MolaError as error:
        print(f"mola {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mola {name}: interrupted", file=sys.stderr)
        return 130


def parse(options_class: Any, arguments: Sequence[str], *, prog: str, summary: str = "") -> Any:
    """Options from flags and, with `--config`, a YAML recipe.

    Raises:
        MolaError: the recipe is unreadable or has unknown keys, or options contradict each other.
        SystemExit: with code 2 and a usage line, for flags that argparse refuses.
    """
    # Here, not above: the command list and --version should not wait for torch.
    from transformers import HfArgumentParser

    arguments, recipe = _take_config(list(arguments))
    parser = HfArgumentParser(options_class, prog=prog, description=summary, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Read options from a YAML file; flags win.")
    flags = {option for action in parser._actions for option in action.option_strings}
    arguments = _recipe_flags(recipe, flags) + arguments
    try:
        options, *_, unknown = parser.parse_args_into_dataclasses(
            args=arguments, look_for_args_file=False, return_remaining_strings=True
        )
    except MolaError:
        raise
    except ValueError as error:  # TrainingArguments' own checks
        raise MolaError(str(error)) from error
    if unknown:
        raise MolaError(_unknown(unknown[0].partition("=")[0], flags))
    return options


def _unknown(word: str, flags: set[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag. Write every option as --flag value."
    close = difflib.get_close_matches(word, flags, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"there is no flag {word}.{hint} Run the command with --help for the list."


def _take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    recipe, rest = None, []
    position = 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        if flag != "--config":
            rest.append(arguments[position])
        elif equals:
            recipe = value
        elif position + 1 < len(arguments):
            position += 1
            recipe = arguments[position]
        else:
            raise MolaError("`--config` needs the name of a YAML file after it.")
        position += 1
    return rest, recipe


def _recipe_flags(recipe: str | None, flags: set[str]) -> list[str]:
    """A recipe as flags, so that argparse checks and converts its values like any others."""
    arguments = []
    for key, value in read_recipe(recipe).items() if recipe is not None else ():
        flag = f"--{key}"
        if flag not in flags or key == "config":
            raise MolaError(f"`{key}` in {recipe} is no option of this command. Run it with --help for the list.")
        if value is None:
            continue
        if isinstance(value, bool):
            arguments += [flag, str(value).lower()]
        elif isinstance(value, dict):
            arguments += [flag, json.dumps(value)]
        elif isinstance(value, list):
            arguments += [flag, ",".join(str(item) for item in value)]
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def read_recipe(path: str) -> dict[str, Any]:
    """Read a YAML recipe: a mapping from option names to values.

    Raises:
        MolaError: not there, no YAML, or no mapping.
    """
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MolaError(f"`config` can not be read: {path!r} ({error}).") from error
    except yaml.YAMLError as error:
        raise MolaError(f"`config` is no YAML: {path!r}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise MolaError(f"`config` must be a mapping from option names to values: {path!r} holds {recipe!r}.")
    return recipe


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: mola COMMAND [--config RECIPE.yaml] [--flag value ...]", "", *lines, "", "mola COMMAND --help"]
    )


if __name__ == "__main__":
    sys.exit(main())

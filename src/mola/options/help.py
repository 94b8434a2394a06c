"""The help text of a command: its options under the headings of their groups, as wide as the terminal."""

import shutil
import textwrap
from argparse import Action
from typing import Any, get_args, get_origin

from mola.options.fields import group_options
from mola.options.parser import OptionsParser, last_without_dashes

_INDENT = " " * 37
_VALUE_NAMES = {int: "INT", float: "FLOAT", bool: "BOOL", dict: "JSON"}


class ShowHelp(Action):
    """`--help` prints mola's own options; `--help all` also prints the other options of `TrainingArguments`."""

    def __call__(self, parser: Any, namespace: object, values: object, option_string: str | None = None) -> None:
        """Print the help text and end the program."""
        print(_help_text(parser, is_complete=values is not None), flush=True)
        parser.exit()


def _help_text(parser: OptionsParser, is_complete: bool) -> str:
    options_class = parser.options_class
    kinds: dict[str, Any] = {"config": str, "help": str, **parser.kinds}
    actions = {action.dest: action for action in reversed(parser._actions)}  # --no_x follows --x and has the same dest
    groups = {heading: [each.name for each in group] for heading, group in group_options(options_class).items()}
    rest = groups.pop("", []) if len(groups) > 1 else []
    next(iter(groups.values())).extend(["config", "help"])
    if rest and is_complete:
        groups["the rest of TrainingArguments"] = rest
    lines = [f"usage: {parser.usage}", "", f"{parser.description}"]
    for heading, names in groups.items():
        lines += ["", f"{heading or 'options'}:", *(_help_entry(actions[n], kinds[n], is_complete) for n in names)]
    if rest and not is_complete:
        lines += [
            "",
            f"`{parser.prog} --help all` also lists options of TrainingArguments. Tables: docs/reference/options.md",
        ]
    return "\n".join(lines)


def shown_flag(action: Action) -> str:
    """The name of an option in messages and help texts."""
    return last_without_dashes(action.option_strings)


def _help_entry(action: Action, kind: Any, with_choices: bool) -> str:
    """One option: its flag, the kind of its value, its text and its default."""
    head = "  " + "".join(f"{flag}, " for flag in action.option_strings if flag[1] != "-") + shown_flag(action)
    if action.const is not True or action.default is True:  # a switch that is off by default needs no value
        types = {get_origin(part) or part for part in get_args(kind) or [kind]}
        head += f" {action.metavar or next((_VALUE_NAMES[each] for each in _VALUE_NAMES if each in types), 'TEXT')}"
    head += " ..." * (action.nargs == "+")
    text = (action.help or "").replace("%%", "%").removesuffix(".")
    if action.choices and with_choices and not action.metavar:
        text += f". One of {', '.join(action.choices)}"
    if action.required:
        text += ". Required"
    elif action.default not in (None, "", []) and action.default is not False:
        text += f". Default {'true' if action.default is True else action.default}"
    width = max(shutil.get_terminal_size().columns, 2 * len(_INDENT)) - 1
    lead = f"{head}  ".ljust(len(_INDENT))
    return textwrap.fill(f"{text}.", width, initial_indent=lead, subsequent_indent=_INDENT, break_on_hyphens=False)

"""Flags are those that Transformers' `HfArgumentParser` makes, and names of `TrainingArguments` are those it has."""

from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from mola.cli import COMMANDS, find
from mola.options.parser import OptionsParser
from mola.training.fields import TrainFields
from mola.training.trainer_names import with_trainer_names

TEXTS = ("yes", "No", "1", "x", "0.5", "linear", "adamw_torch", '{"a": 1}')


class TheirParser(HfArgumentParser):
    def add_argument(self, *names, **settings):
        settings.pop("writes", None)  # mola's own mark of a result
        return super().add_argument(*names, **settings)


def settings_of(action):
    choices = None if action.choices is None else list(action.choices)
    more = (action.nargs, action.const, action.default, choices, action.required, action.help, action.metavar)
    return type(action), action.option_strings, action.dest, more


def converted(action, text):
    try:
        return text if action.type is None else action.type(text)
    except Exception:
        return "refused"


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_those_of_the_parser_of_transformers(command):
    options = find(COMMANDS[command].options)
    renamed = {each.name for each in fields(options) if "aliases" in each.metadata}
    ours, theirs = OptionsParser(options)._actions, TheirParser(options, add_help=False)._actions
    for one, other in zip(ours, theirs, strict=True):
        if one.dest in renamed:  # theirs also have the name of the field
            other.option_strings = other.option_strings[-len(one.option_strings) :]
    assert [*map(settings_of, ours)] == [*map(settings_of, theirs)]
    for one, other in zip(ours, theirs, strict=True):
        for text in TEXTS[:-1] if one.dest == "liger_kernel_config" else TEXTS:  # theirs cannot read a mapping
            assert (one.dest, converted(one, text)) == (one.dest, converted(other, text))


def test_names_of_the_trainer_are_read_from_its_source():
    quick = OptionsParser(with_trainer_names(TrainFields))
    complete = OptionsParser(find(COMMANDS["train"].options))
    assert {*quick.flags} == {*complete.flags}
    assert {each.name for each in fields(TrainingArguments) if each.init} <= {*quick.kinds}
    own = {each.name for each in fields(TrainFields)}
    for flag, action in quick.flags.items():
        if action.dest in own:
            assert settings_of(action) == settings_of(complete.flags[flag])


def test_without_the_source_of_transformers_the_whole_class_is_used(monkeypatch):
    monkeypatch.setattr("mola.training.trainer_names.find_spec", lambda name: None)
    assert with_trainer_names(TrainFields) is None

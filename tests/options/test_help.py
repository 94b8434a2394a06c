"""`--help` of the commands: groups, what a newcomer sets first, nothing of mola's own left out, `--help all`."""

import inspect
import re
from dataclasses import fields
from enum import Enum
from typing import get_args, get_type_hints

import pytest
from transformers import TrainingArguments

from mola import TrainOptions
from mola._compat import has_activation_checkpointing
from mola.cli import COMMANDS, find, main
from mola.options.fields import group_options, is_required, shown_name
from tests.versions import needs

FEW = ("prepare", "lm-eval", "plan", "allocate", "reallocate", "merge", "report", "doctor", "quickstart")
FEW += ("skills remove", "skills list", "skills merge")
OF_THE_TRAINER = ("train", "continual", "compare")
FIRST = (
    *("base_model", "data", "task", "output", "num_experts", "r", "top_k", "cutoff_len", "num_train_epochs"),
    *("learning_rate", "batch_size", "gradient_accumulation_steps", "config", "help"),
)
KNOWN_FROM_TRAINER = (
    *("max_steps", "warmup_steps", "lr_scheduler_type", "weight_decay", "bf16", "fp16", "activation_checkpointing"),
    *("seed", "logging_strategy", "logging_steps", "report_to", "eval_strategy", "eval_steps", "save_strategy"),
    *("per_device_eval_batch_size", "save_steps", "save_total_limit", "load_best_model_at_end", "push_to_hub"),
    "resume_from_checkpoint",
)
# docs/guides/training.md says why the first of these have other defaults.
OTHER_DEFAULTS = {"learning_rate", "warmup_steps", "logging_steps", "logging_nan_inf_filter", "hub_strategy"}
OTHER_DEFAULTS |= {"eval_strategy", "save_strategy", "load_best_model_at_end"}


@pytest.fixture
def help_of(monkeypatch, capsys):
    def printed(*words, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        return capsys.readouterr().out

    return printed


def options_class(command):
    return find(COMMANDS[command].options)


def own_options(cls):
    """Names of the options that mola declares."""
    ours = [parent for parent in cls.__mro__ if parent.__module__.startswith("mola.")]
    names = {each.name for each in fields(cls) if each.init}
    return {name for parent in ours for name in inspect.get_annotations(parent)} & names


def shown(cls, names):
    by_name = {each.name: shown_name(each) for each in fields(cls)}
    return sorted(by_name.get(name, name) for name in names)


def flags(text):
    """Heading -> names of the flags below it."""
    parts = re.split(r"^(\S.*):\n", text, flags=re.M)[1:]
    return {
        heading: re.findall(r"^  (?:-h, )?--(\w+)", body, re.M)
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def listed(text):
    return [name for names in flags(text).values() for name in names]


def test_train_fits_two_screens_and_begins_with_what_a_newcomer_sets(help_of):
    text = help_of("train", "--help")
    lines = text.splitlines()
    assert len(lines) <= 98
    assert max(map(len, lines)) <= 100
    groups = flags(text)
    assert list(groups) == ["start with these", "adapter", "data", "base model", "run"]
    assert tuple(groups["start with these"]) == FIRST
    assert set(KNOWN_FROM_TRAINER) <= set(groups["run"])
    assert "mola train --help all" in lines[-1]
    assert "docs/reference/options.md" in lines[-1]
    assert help_of("train", "-h") == text


@needs("transformers", "5.16", "its own texts have others")
@pytest.mark.parametrize("options", [*map(options_class, COMMANDS)], ids=lambda cls: cls.__name__)
def test_percent_signs_are_escaped_for_argparse(options):
    """Python 3.14 refuses others when a parser is made."""
    for each in fields(options):
        assert "%" not in str(each.metadata.get("help", "")).replace("%%", ""), each.name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_listed_once_those_of_mola_first(command, help_of):
    cls = options_class(command)
    short, everything = listed(help_of(command, "--help")), listed(help_of(command, "--help", "all"))
    assert sorted(short) == shown(cls, {*own_options(cls), "config", "help"})
    assert everything[: len(short)] == short
    names = {each.name for each in fields(cls) if each.init}
    assert sorted(everything) == shown(cls, {*names, "config", "help"})
    assert (everything != short) == (command in OF_THE_TRAINER)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_have_a_group_where_a_command_has_groups(command):
    groups = group_options(options_class(command))
    if command in FEW:
        assert list(groups) == [""]
    else:
        without = {each.name for each in groups.get("", [])}
        assert not without & own_options(options_class(command))
        assert next(iter(groups)) == "start with these"


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in OF_THE_TRAINER])
def test_required_options_come_first(command):
    first, *others = group_options(options_class(command)).values()
    required = [is_required(each) for each in first]
    assert required == sorted(required, reverse=True)
    assert not any(is_required(each) for group in others for each in group)


def test_a_line_shows_flag_value_text_and_default(help_of):
    def said(command, flag, *words):
        text = help_of(command, "--help", *words, columns=1000)
        return re.search(rf"^  ({flag}\b.*?) {{2,}}(.*)$", text, re.M).groups()

    assert said("convert", "--output") == ("--output TEXT", "Folder to write; it must be new or empty. Required.")
    assert said("train", "--learning_rate") == ("--learning_rate FLOAT", "Learning rate after warm-up. Default 0.0003.")
    assert said("train", "--push_to_hub")[0] == "--push_to_hub"
    assert said("train", "--add_eos_token")[0] == "--add_eos_token BOOL"
    assert said("train", "--add_eos_token")[1].endswith("Default true.")
    assert said("train", "--filters")[0] == "--filters JSON"
    assert said("train", "--limit") == ("--limit INT", "Train on this many samples only, the first ones.")
    assert said("serve", "--adapter")[0] == "--adapter TEXT ..."
    assert said("convert", "--from")[0] == "--from TEXT"
    assert "One of adamw_torch, " in said("train", "--optim", "all")[1]
    assert "~20%" in said("train", "--use_liger_kernel", "all")[1]


def test_narrow_terminals(help_of):
    assert listed(help_of("train", "--help", columns=1)) == listed(help_of("train", "--help"))


@pytest.mark.parametrize("words", [["--help", "al"], ["--help=al"]])
def test_an_unknown_word_is_refused_with_the_choices(words, capsys):
    assert main(["train", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("mola train: error: ")
    assert words[-1].removeprefix("--help=") in line
    assert "choose from" in line
    assert "all" in line.partition("choose from")[2]


def test_a_help_text_of_mola_changes_nothing_else_of_an_option():
    kinds, expected = get_type_hints(TrainOptions), get_type_hints(TrainingArguments)
    own, base = TrainOptions.__dataclass_fields__, TrainingArguments.__dataclass_fields__
    shared = own_options(TrainOptions) & set(base)
    new_names = set() if has_activation_checkpointing() else {"activation_checkpointing"}
    assert set(KNOWN_FROM_TRAINER) - new_names <= shared
    assert {name for name in shared if own[name].default != base[name].default} == OTHER_DEFAULTS
    for name in shared - OTHER_DEFAULTS:
        kind = expected[name]
        is_enum = any(isinstance(part, type) and issubclass(part, Enum) for part in get_args(kind))
        assert (name, kinds[name]) == (name, str if is_enum else kind)  # an enum would need Transformers
        added = {"help": "", "aliases": None}  # texts, and names of mola's own
        assert {**own[name].metadata, **added} == {**base[name].metadata, **added}

"""The command line: every command's flags, and one line with exit code 2 at the end."""

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola.architecture.notation import check_notation, resolve_per_layer
from mola.cli import COMMANDS, main
from mola.options.parsing import parse
from mola.tuner import MolaConfig
from tests.fuzz.checking import fuzz, survives
from tests.fuzz.documents import JSON_TEXTS, SCALARS, TEXTS, changed, files, values, written

WORDS = TEXTS | st.sampled_from([*JSON_TEXTS.values(), "1", "-1", "nan", "inf", "1e9", '{"a": 1}', "1,2"])
WORDS |= st.sampled_from(["2468", "a,,b", "true", "10,"]) | SCALARS.map(str)


@st.composite
def flags(draw, options_class):
    names = [name for name in options_class.__dataclass_fields__ if name not in ("output_dir",)]
    given_ = draw(st.lists(st.tuples(st.sampled_from(names) | TEXTS, WORDS, st.booleans()), max_size=4))
    place = ["--output_dir=out"] if "output_dir" in options_class.__dataclass_fields__ else []
    return place + [
        part for name, word, joined in given_ for part in ([f"--{name}={word}"] if joined else [f"--{name}", word])
    ]


def _options_class(command):
    return getattr(importlib.import_module(COMMANDS[command].module), COMMANDS[command].options)


@pytest.mark.parametrize("command", sorted(COMMANDS))
@fuzz
@given(data=st.data())
def test_flags(command, data):
    options_class = _options_class(command)
    arguments = data.draw(flags(options_class))
    if not any(word.partition("=")[0] in ("--help", "-h") for word in arguments):
        survives(parse, options_class, arguments, prog=command, positional=COMMANDS[command].positional)


@fuzz
@given(st.lists(WORDS, max_size=3).filter(lambda words: not {"--help", "-h", "help"} & set(words)))
def test_words_after_the_command(words):
    assert survives(main, ["convert", *words]) == 2


@pytest.mark.parametrize("name", ["num_experts", "r", "top_k"])
@fuzz
@given(value=values(JSON_TEXTS) | st.lists(SCALARS, max_size=4) | WORDS, layers=st.integers(1, 40))
def test_notation(name, value, layers):
    survives(check_notation, value, name)
    survives(resolve_per_layer, value, layers, name)


ALLOCATION = {"num_experts": [1, 2, 3, 4], "method": "triangle", "layers": [{"layer_index": 0, "score": None}]}


@fuzz
@given(files(ALLOCATION) | files([1, 2, 3, 4]))
def test_allocation_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "allocation.json"
    path.write_bytes(content)
    survives(resolve_per_layer, str(path), 4, "num_experts")


CONFIG = MolaConfig(r=[2, 2], num_experts=[1, 2], top_k=1, target_modules=["q_proj"], layers_to_transform=[0]).to_dict()


@fuzz
@given(changed(CONFIG))
def test_configuration(found):
    if isinstance(found, dict):
        survives(lambda: MolaConfig(**{str(key): value for key, value in found.items()}))


def test_an_error_is_one_line(capsys, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(written({"base_model": "a\nb"}, {}) + "\n...\n")
    assert main(["plan", "--config", str(path), "--num_experts", "a\nb\x1b[31m"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_is_short_and_leaves_the_terminal_alone(capsys):
    assert main(["plan", "--base_model", "m", "--r", "x" * 100_000]) == 2
    assert len(capsys.readouterr().err) < 5_000
    assert main(["plan", "--base\x1b[31m", "m"]) == 2
    assert "\x1b" not in capsys.readouterr().err

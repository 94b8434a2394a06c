"""The stream of reasoning tasks: which tasks it has, and its table, from records made by hand."""

import json

import pytest
from benchmarks.errors import finished
from benchmarks.reasoning_stream import Stream, StreamOptions, main, table

from mola import MolaError, TrainResult


def a_folder(path, learned):
    path.mkdir(exist_ok=True)
    (path / "learned.json").write_text(json.dumps(learned), encoding="utf-8")
    return StreamOptions(tasks_folder=str(path), base_model=str(path), record=str(path / "record.json"))


def test_the_stream_has_the_tasks_that_were_learned(tmp_path, tiny_model_dir):
    learned = {
        "gcd": {"base": 0.1, "learned": 0.5},
        "aiw": {"base": 0.4, "learned": 0.5},
        "dice": {"base": 0, "learned": 1},
    }
    options = a_folder(tmp_path / "two", learned)
    options.base_model = str(tiny_model_dir)
    assert Stream(options).tasks == ["gcd", "dice"]
    with pytest.raises(MolaError, match=r"two learned tasks: got \['gcd'\]"):
        Stream(a_folder(tmp_path / "one", {"gcd": learned["gcd"]}))


def test_the_table_has_answers_and_who_was_asked():
    methods = {
        "own": {"marks": {"a": "1111", "b": "1100"}},
        "skills": {"marks": {"a": "1110", "b": "1100"}, "asked": {"a": {"a": 3, "None": 1}, "b": {"b": 4}}},
    }
    lines = table({"tasks": ["a", "b"], "methods": methods}).splitlines()
    assert lines[0] == "| task | own | skills | skills, asked right |"
    assert lines[2:] == [
        "| a | 100.0 | 75.0 | 75.0 |",
        "| b | 50.0 | 50.0 | 100.0 |",
        "| all | 75.0 | 62.5 | 87.5 |",
    ]


def test_an_unknown_method_is_an_error_of_one_line(capsys):
    assert main(["--methods", "magic"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_half_a_training_is_an_error_not_a_result():
    ended = TrainResult("runs/gcd", "finished", 200, {}, 10, None, 1.0)
    assert finished(ended) is ended
    stopped = TrainResult("runs/gcd", "interrupted", 131, {}, 10, None, 1.0)
    with pytest.raises(MolaError, match="runs/gcd was interrupted at step 131"):
        finished(stopped)

"""`python -m benchmarks.skills_decisions` from end to end on the tiny model, and the shifts of text."""

import json
import random

import pytest
from benchmarks.skills_decisions import main
from benchmarks.text_shifts import (
    code_texts,
    content_shifts,
    first_half,
    manual_paragraphs,
    paraphrase,
    preamble,
    with_sentence_inside,
)


@pytest.fixture
def data(tmp_path):
    """Rows of two kinds that differ in their letters, and of an unknown kind."""
    draw = random.Random(0)
    letters = {"low": "abcd", "high": "wxyz", "signs": "+-*/"}
    for name, some in letters.items():
        rows = [{"question": "".join(draw.choices(some, k=12)), "answer": 0} for _ in range(12)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return {name: f"{name}={tmp_path / name}.json" for name in letters}


def test_decisions_on_real_text_are_counted(tiny_model_dir, data, tmp_path, capsys):
    output = tmp_path / "decisions.json"
    words = ["--base_model", str(tiny_model_dir), "--data", data["low"], data["high"], "--unknown", data["signs"]]
    words += ["--rows", "5", "--long_rows", "2", "--preambles", "3", "9", "--seeds", "0", "1", "--output", str(output)]
    assert main(words) == 0
    record = json.loads(output.read_text())
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    shifts = record["runs"][0]["shifts"]
    assert {"as trained", "upper case", "long alpaca template", "preamble of 9 tokens"} <= set(shifts)
    for kind in ("low", "high"):
        assert shifts["as trained"][kind]["skills without threshold"][kind] >= 4
        assert sum(shifts["preamble of 9 tokens"][kind]["skills"].values()) == 2
    assert set(record["runs"][0]["others"]) == {"signs", "Python's manual", "Python's source code"}
    assert set(record["runs"][0]["left out"]) == {"low", "high"}
    assert str(tmp_path) not in json.dumps(record["runs"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| as trained | ")


def test_wrong_data_are_named(tiny_model_dir, data, capsys):
    words = ["--base_model", str(tiny_model_dir), "--rows", "5"]
    assert main([*words, "--data", data["low"]]) == 2
    assert "at least two kinds" in capsys.readouterr().err
    assert main([*words, "--rows", "50", "--data", data["low"], data["high"]]) == 2
    assert "100 different texts" in capsys.readouterr().err


def test_shifts_change_the_text_as_they_say(tiny_tokenizer):
    assert paraphrase("Where will people go?") == "Tell me, please: In which place is going to persons go?"
    assert first_half("one two three four five") == "one two"
    assert with_sentence_inside("a b c d", "Yes. No.") == "a b Yes. c d"
    assert len(tiny_tokenizer(preamble(tiny_tokenizer, 20, random.Random(0)))["input_ids"]) >= 20
    assert len(manual_paragraphs()) > 100
    assert len(code_texts()) > 20
    texts = {
        name: change("Is it so?", "No.", 1, random.Random(0)) for name, change in content_shifts(tiny_tokenizer).items()
    }
    assert texts["lower case without marks"] == "is it so"
    assert len(set(texts.values())) == len(texts)

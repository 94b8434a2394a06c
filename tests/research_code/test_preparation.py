"""The preparation scripts: flags, what they write, and what cannot happen any more."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from research_code.preparation import (
    SCIENCEQA_COLUMNS,
    SPLITS,
    InstructionOptions,
    ScienceQAOptions,
    prepare_instruction,
    prepare_scienceqa,
)

from mola.data.examples import load_examples
from mola.data.tasks import load_task
from mola.options.parsing import parse
from tests.data.orca import files_of, orca_rows, write_orca
from tests.research_code.scripts import COLUMNS, SCRIPTS, error_line, run_script
from tests.versions import needs

SCIENCEQA, INSTRUCTION = "preparation_scienceqa_data.py", "preparation_instruction_data.py"
ROW = {
    "image": None,
    "question": "Which plant grows?",
    "choices": ["the fern", "the  rock", "a pen"],
    "answer": 0,
    "hint": "  Plants need light. ",
    **dict.fromkeys(["task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"], "text"),
}
PROMPT = "Context: Plants need light.\nQuestion: Which plant grows?\nOptions: (A) the fern (B) the  rock (C) a pen\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(folder, **rows):
    """`dataset` for the script: a file per split, one row each if nothing is said."""
    files = {split: rows.get(split, [{**ROW, "question": f"{split}?"}]) for split in SPLITS}
    return ",".join(f"{split}={write(folder / f'{split}.jsonl', rows)}" for split, rows in files.items())


def prepared(folder, name="scienceqa"):
    return datasets.load_from_disk(str(folder / name / "science_qa.hf"))


def scienceqa(folder, monkeypatch, dataset, *flags):
    return run_script(SCIENCEQA, monkeypatch, "--dataset", dataset, "--save_path", folder / "scienceqa", *flags)


def instruction(folder, monkeypatch, dataset, *flags):
    sizes = ("--num_samples", 40, "--num_validation", 10, "--num_test", 10)
    return run_script(INSTRUCTION, monkeypatch, "--dataset", dataset, "--save_path", folder / "orca.hf", *sizes, *flags)


# ---------------------------------------------------------------------- flags


def test_defaults_are_those_of_the_research_code():
    assert parse(ScienceQAOptions, [], prog="x") == ScienceQAOptions("derek-thomas/ScienceQA", "./scienceqa", False)
    options = parse(InstructionOptions, [], prog="x")
    assert (options.dataset, options.num_samples) == ("Open-Orca/OpenOrca", 50000)
    assert options.save_path == "./meta_moe_50k.hf"
    assert options.seed == 10
    assert options.num_validation + options.num_test == 2000


@pytest.mark.parametrize("name", [SCIENCEQA, INSTRUCTION])
def test_help_and_wrong_flags(name, monkeypatch, capsys):
    assert run_script(name, monkeypatch, "--help") == 0
    assert "--save_path" in capsys.readouterr().out
    assert run_script(name, monkeypatch, "--save_pth", "x") == 2
    assert "no flag --save_pth" in error_line(name, capsys)
    assert run_script(name, monkeypatch, "--dataset", "missing.jsonl") == 2
    assert error_line(name, capsys).startswith(f"{name}: error: `data` must be an existing file or folder")


# ---------------------------------------------------------------------- ScienceQA


def test_science_questions_are_written_byte_for_byte(tmp_path, monkeypatch, capsys):
    rows = [ROW, {**ROW, "image": {"bytes": "x"}}, {**ROW, "hint": "", "question": "a\n{b}?", "answer": 2}]
    assert scienceqa(tmp_path, monkeypatch, questions(tmp_path, train=rows)) == 0
    out = tmp_path / "scienceqa"
    assert sorted(path.name for path in out.iterdir()) == [
        *("science_qa.hf", "scienceq_test.json", "scienceq_train.json", "scienceq_validation.json")
    ]
    text = (out / "scienceq_train.json").read_text(encoding="ascii")
    first, second = json.loads(text)
    assert text == json.dumps([first, second])
    assert list(first) == COLUMNS
    assert first == {
        **ROW,
        "answer": "A",
        "input": "",
        "instruction": PROMPT,
        "output": "Answer: The answer is A.",
    }
    assert second["instruction"] == ("Context: N/A\nQuestion: a\n{b}?\nOptions: (A) the fern (B) the  rock (C) a pen\n")
    assert second["answer"] == "C"
    saved = prepared(tmp_path)
    assert list(saved) == ["train", "validation", "test"]
    assert saved["train"].to_list() == [first, second]
    printed = capsys.readouterr().out
    assert "train: 2 rows, 1 with an image left out" in printed
    assert printed.index("test: ") < printed.index("validation: ") < printed.index("train: ")
    assert "DatasetDict" in printed


def test_types_are_those_of_the_published_sample(tmp_path, monkeypatch):
    scienceqa(tmp_path, monkeypatch, questions(tmp_path))
    for part in prepared(tmp_path).values():
        assert part.column_names == COLUMNS
        kinds = {name: str(part.data.schema.field(name).type) for name in COLUMNS}
        assert kinds.pop("image") == "null"
        assert kinds.pop("choices") == "list<item: string>"
        assert set(kinds.values()) == {"string"}


def test_missing_columns_are_null_and_others_are_kept(tmp_path, monkeypatch):
    rows = [{"id": "q1", "answer": 1, "question": "a é?", "choices": ["x", "y"], "more": 5}]
    assert scienceqa(tmp_path, monkeypatch, questions(tmp_path, train=rows)) == 0
    saved = prepared(tmp_path)["train"]
    assert saved.column_names == [*COLUMNS[:13], "id", "more", *COLUMNS[13:]]
    assert saved[0] == {
        **dict.fromkeys(SCIENCEQA_COLUMNS),
        **{**rows[0], "answer": "B", "input": "", "output": "Answer: The answer is B."},
        "instruction": "Context: N/A\nQuestion: a é?\nOptions: (A) x (B) y\n",
    }
    assert str(saved.features["lecture"].dtype) == "string"
    assert (tmp_path / "scienceqa" / "scienceq_train.json").read_bytes().isascii()


def test_saved_dataset_with_images_and_another_split_is_a_source(tmp_path, monkeypatch, capsys):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("int8"),
            "hint": datasets.Value("string"),
        }
    )
    # Not a picture: whoever decodes it fails.
    rows = [{**{name: ROW[name] for name in features}, "image": image} for image in (None, {"bytes": b"no"}, None)]
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    part = datasets.Dataset(table, datasets.DatasetInfo(features=features))
    datasets.DatasetDict(dict.fromkeys([*SPLITS, "more"], part)).save_to_disk(str(tmp_path / "d"))
    assert scienceqa(tmp_path, monkeypatch, tmp_path / "d") == 0
    assert [len(saved) for saved in prepared(tmp_path).values()] == [2, 2, 2]
    assert str(prepared(tmp_path)["train"].data.schema.field("image").type) == "null"
    printed = capsys.readouterr().out
    assert "warning: the split more is not used" in printed
    assert "warning: 1 instructions occur in more than one split" in printed


@settings(max_examples=15, deadline=None)  # every example writes files
@given(
    question=st.text(st.characters(exclude_categories=["Cs"])),
    hint=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=26),
)
def test_any_question_is_written_as_the_format_says(tmp_path_factory, question, hint, choices):
    folder = tmp_path_factory.mktemp("q")
    row = {**ROW, "question": question, "hint": hint, "choices": choices, "answer": len(choices) - 1}
    prepare_scienceqa(ScienceQAOptions(questions(folder, test=[row]), str(folder / "scienceqa")))
    (written,) = json.loads((folder / "scienceqa" / "scienceq_test.json").read_text())
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    context = ((hint or "") + " " + "").strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    assert written["instruction"] == f"Context: {context}\nQuestion: {question}\nOptions: {options}\n"
    assert written["output"] == f"Answer: The answer is {letters[-1]}."
    assert written == prepared(folder)["test"][0]


def test_both_outputs_can_be_read_by_the_other_commands(tmp_path, monkeypatch):
    scienceqa(tmp_path, monkeypatch, questions(tmp_path))
    task = load_task("scienceqa")
    from_json = load_examples(tmp_path / "scienceqa" / "scienceq_test.json", task, "test")
    assert from_json == load_examples(tmp_path / "scienceqa" / "science_qa.hf", task, "test")
    assert (from_json[0]["answer"], from_json[0]["num_choices"]) == ("A", 3)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"answer": 3}, ["`answer`", "0 to 2", "got 3"]),
        ({"answer": -1}, ["`answer`", "got -1"]),
        ({"choices": ["x"] * 27}, ["`choices`", "2 to 26"]),
        ({"question": None}, ["`question` must be text"]),
    ],
)
def test_row_that_is_no_question_is_an_error_and_nothing_is_written(tmp_path, monkeypatch, capsys, changes, parts):
    dataset = questions(tmp_path, train=[ROW, {**ROW, **changes}])
    before = sorted(path.name for path in tmp_path.iterdir())
    assert scienceqa(tmp_path, monkeypatch, dataset) == 2
    line = error_line(SCIENCEQA, capsys)
    assert all(part in line for part in ["row `train-1`", *parts])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_six_choices_and_no_hint_are_fine(tmp_path, monkeypatch):
    row = {**ROW, "choices": list("uvwxyz"), "answer": 5, "hint": None}
    assert scienceqa(tmp_path, monkeypatch, questions(tmp_path, train=[row])) == 0
    assert prepared(tmp_path)["train"]["output"][0] == "Answer: The answer is F."
    assert "(F) z" in prepared(tmp_path)["train"]["instruction"][0]


def test_split_without_rows_keeps_its_columns(tmp_path, monkeypatch, capsys):
    assert scienceqa(tmp_path, monkeypatch, questions(tmp_path, test=[{**ROW, "image": "x"}])) == 0
    assert "warning: test is empty" in capsys.readouterr().out
    saved = prepared(tmp_path)
    assert len(saved["test"]) == 0
    assert saved["test"].features == saved["train"].features
    assert (tmp_path / "scienceqa" / "scienceq_test.json").read_text() == "[]"


def test_missing_split_and_nothing_but_images_are_errors(tmp_path, monkeypatch, capsys):
    alone = write(tmp_path / "alone.jsonl", [ROW])
    assert scienceqa(tmp_path, monkeypatch, alone) == 2
    assert "has no validation, no test, only train" in error_line(SCIENCEQA, capsys)
    images = questions(tmp_path, **{split: [{**ROW, "image": "x"}] for split in SPLITS})
    assert scienceqa(tmp_path, monkeypatch, images) == 2
    assert "`dataset` must have rows without an image" in error_line(SCIENCEQA, capsys)
    assert not (tmp_path / "scienceqa").exists()


def test_lecture_and_solution_change_nothing(tmp_path, monkeypatch):
    plain = {**ROW, "lecture": None, "solution": None}
    scienceqa(tmp_path, monkeypatch, questions(tmp_path, train=[plain, {**ROW, "lecture": "L", "solution": "E"}]))
    first, second = prepared(tmp_path)["train"]
    assert (first["instruction"], first["output"]) == (second["instruction"], second["output"])


def test_folder_is_replaced_only_on_request_and_only_an_own_one(tmp_path, monkeypatch, capsys):
    dataset = questions(tmp_path)
    assert scienceqa(tmp_path, monkeypatch, dataset) == 0
    assert scienceqa(tmp_path, monkeypatch, dataset) == 2
    assert "`save_path` must be empty" in error_line(SCIENCEQA, capsys)
    assert scienceqa(tmp_path, monkeypatch, dataset, "--overwrite") == 0
    (tmp_path / "scienceqa" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert scienceqa(tmp_path, monkeypatch, dataset, "--overwrite") == 2
    assert "only if this script wrote it" in error_line(SCIENCEQA, capsys)
    assert (tmp_path / "scienceqa" / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------- instruction data


def test_instruction_data_are_plain_text(tmp_path, monkeypatch, capsys):
    rows = list(orca_rows(200))
    assert instruction(tmp_path, monkeypatch, write(tmp_path / "a.jsonl", rows)) == 0
    saved = datasets.load_from_disk(str(tmp_path / "orca.hf"))
    assert {split: len(part) for split, part in saved.items()} == {"train": 40, "validation": 10, "test": 10}
    texts = {(row["question"].strip() + "\n" + row["response"]).strip() for row in rows}
    for part in saved.values():
        assert part.column_names == ["input", "instruction", "output"]
        assert all(row["input"] is None and row["instruction"] is None and row["output"] in texts for row in part)
    printed = capsys.readouterr().out
    assert "4 groups, each keeps its share" in printed
    assert "train: 40 rows" in printed
    assert "DatasetDict" in printed


def test_no_text_is_drawn_twice_or_for_two_splits(tmp_path, monkeypatch):
    rows = list(orca_rows(60))
    copies = [{**row, "id": f"cot.{500 + index}"} for index, row in enumerate(rows)]
    assert instruction(tmp_path, monkeypatch, write(tmp_path / "a.jsonl", rows + copies)) == 0
    outputs = [row["output"] for part in datasets.load_from_disk(str(tmp_path / "orca.hf")).values() for row in part]
    assert len(outputs) == len(set(outputs)) == 60


def test_more_samples_than_rows_is_an_error(tmp_path, monkeypatch, capsys):
    assert instruction(tmp_path, monkeypatch, write_orca(tmp_path / "a.jsonl", 59)) == 2
    line = error_line(INSTRUCTION, capsys)
    assert "at most 59 rows together: got 40 for train + 10 for validation + 10 for test = 60" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_sizes_are_exact_for_small_groups_and_ids_without_a_dot(tmp_path, monkeypatch):
    rows = [
        {**row, "id": f"g{index % 23}.{index}" if index % 2 else f"x{index}"} for index, row in enumerate(orca_rows(90))
    ]
    assert instruction(tmp_path, monkeypatch, write(tmp_path / "a.jsonl", rows)) == 0
    saved = datasets.load_from_disk(str(tmp_path / "orca.hf"))
    assert {split: len(part) for split, part in saved.items()} == {"train": 40, "validation": 10, "test": 10}


def test_order_is_not_that_of_the_groups(tmp_path, monkeypatch):
    rows = [{**row, "id": f"{'ab'[index >= 30]}.{index}"} for index, row in enumerate(orca_rows(60))]
    first_half = {(row["question"].strip() + "\n" + row["response"]).strip() for row in rows[:30]}
    assert instruction(tmp_path, monkeypatch, write(tmp_path / "a.jsonl", rows)) == 0
    is_first = [text in first_half for text in datasets.load_from_disk(str(tmp_path / "orca.hf"))["train"]["output"]]
    assert sum(is_first) == 20
    assert 5 <= sum(is_first[:20]) <= 15


def test_empty_held_out_splits_are_there(tmp_path):
    data = write_orca(tmp_path / "a.jsonl", 50)
    prepare_instruction(InstructionOptions(str(data), 50, str(tmp_path / "o"), num_validation=0, num_test=0))
    saved = datasets.load_from_disk(str(tmp_path / "o"))
    assert {split: len(part) for split, part in saved.items()} == {"train": 50, "validation": 0, "test": 0}
    assert saved["test"].features == saved["train"].features


def test_only_an_own_dataset_is_replaced(tmp_path, monkeypatch, capsys):
    data = write_orca(tmp_path / "a.jsonl", 60)
    assert instruction(tmp_path, monkeypatch, data) == 0
    before = files_of(tmp_path / "orca.hf")
    assert instruction(tmp_path, monkeypatch, data, "--seed", 11) == 2
    assert "`--overwrite`" in error_line(INSTRUCTION, capsys)
    assert files_of(tmp_path / "orca.hf") == before
    assert instruction(tmp_path, monkeypatch, data, "--seed", 11, "--overwrite") == 0
    assert files_of(tmp_path / "orca.hf") != before
    other = datasets.DatasetDict({split: datasets.Dataset.from_list([{"a": 1}]) for split in SPLITS})
    other.save_to_disk(str(tmp_path / "mine"))
    capsys.readouterr()
    words = ("--dataset", data, "--num_samples", 40, "--num_validation", 10, "--num_test", 10, "--overwrite")
    assert run_script(INSTRUCTION, monkeypatch, *words, "--save_path", tmp_path / "mine") == 2
    assert "only if this script wrote it" in error_line(INSTRUCTION, capsys)


# ---------------------------------------------------------------------- as programs: bytes and memory

# Prints the peak of the resident memory of the program it runs, in MB.
_MEASURE = """
import resource, subprocess, sys
process = subprocess.run(sys.argv[1:], capture_output=True, text=True)
assert process.returncode == 0, process.stderr
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // (1024**2 if sys.platform == "darwin" else 1024))
"""


def peak_megabytes(folder, *words):
    environment = {**os.environ, "HF_HOME": str(folder / "hf-home"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    cached = [path for path in (folder / "hf-home").rglob("*") if path.is_file()]
    assert cached == [], "the cache was written to"
    return int(process.stdout)


def prepare_command(data, out, num_samples, seed):
    program = os.path.join(os.path.dirname(sys.executable), "mola")
    words = ["--data", data, "--output_dir", out, "--num_samples", num_samples, "--seed", seed]
    return [program, "prepare", "openorca", *words]


def script_command(data, out, num_samples, seed):
    words = ["--dataset", data, "--save_path", out, "--num_samples", num_samples, "--seed", seed]
    return [sys.executable, SCRIPTS / INSTRUCTION, *words]


@needs("datasets", "4.7", "it imports torch for itself while data is prepared")
@pytest.mark.slow
@pytest.mark.parametrize("command", [prepare_command, script_command])
def test_memory_does_not_grow_with_the_source(tmp_path, command):
    few, many = (write_orca(tmp_path / f"{count}.jsonl", count) for count in (5_000, 20_000))
    small = peak_megabytes(tmp_path, *command(few, tmp_path / "small", 2_000, 0))
    large = peak_megabytes(tmp_path, *command(many, tmp_path / "large", 2_000, 0))
    # 15,000 rows more are 10 MB of text, and 30 MB or more as Python objects. What is drawn is mapped once.
    assert small < 300
    assert large - small < 10


@pytest.mark.slow
@pytest.mark.parametrize("command", [prepare_command, script_command])
def test_same_seed_gives_the_same_bytes_in_less_than_a_gigabyte(tmp_path, command):
    data = write_orca(tmp_path / "a.jsonl", 100_000)
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert peak_megabytes(tmp_path, *command(data, tmp_path / name, 50_000, seed)) < 1000
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one if name.endswith((".arrow", "n.json")) and "info" not in name)

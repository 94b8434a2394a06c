import json
import logging
from dataclasses import replace

import datasets
import pytest
import yaml

from mola.data.examples import load_examples
from mola.data.prepare import SAMPLE_SIZES, PrepareOptions, prepare
from mola.data.read import read_rows
from mola.data.tasks import load_task
from mola.errors import MolaError

TASK = load_task("scienceqa")


def question(number, **changes):
    return {
        "question": f"Which is {number}?",
        "choices": ["yes", "no", "é"],
        "answer": number % 3,
        "hint": "",
        "image": None,
        **changes,
    }


def write(folder, rows, name="a.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def run(folder, **options):
    return prepare(PrepareOptions(**{"task": "scienceqa", "output_dir": str(folder / "out"), **options}))


def french(tmp_path, **changes):
    """A task that reads the columns that it writes."""
    layout = {"name": "french", "version": 1, "template": "meta", "columns": ["instruction", "output"]}
    layout |= {"instruction": "Into French: {instruction}", "output": "It is {output}.", **changes}
    (tmp_path / "french.yaml").write_text(yaml.safe_dump(layout))
    return str(tmp_path / "french.yaml")


def test_raw_rows_go_through_the_task(tmp_path):
    path = write(tmp_path, [question(4), question(5, id=7, topic="biology")])
    assert load_examples(path, TASK, "train") == [
        {
            "id": "train-0",
            "instruction": "Context: N/A\nQuestion: Which is 4?\nOptions: (A) yes (B) no (C) é\n",
            "input": "",
            "output": "Answer: The answer is B.",
            "answer": "B",
            "num_choices": 3,
        },
        {
            "id": "7",
            "instruction": "Context: N/A\nQuestion: Which is 5?\nOptions: (A) yes (B) no (C) é\n",
            "input": "",
            "output": "Answer: The answer is C.",
            "answer": "C",
            "num_choices": 3,
            "topic": "biology",
        },
    ]


def test_prepared_rows_are_taken_as_they_are(tmp_path):
    row = {"instruction": "Do {it}\n", "input": None, "output": "Done"}
    path = write(tmp_path, [row, {**row, "id": "x", "answer": "B", "choices": ["1", "2"], "topic": "t"}])
    plain = {"instruction": "Do {it}\n", "input": "", "output": "Done", "num_choices": None}
    first, second = load_examples(path, None, None)
    assert first == {"id": "row-0", **plain, "answer": None}
    assert second == {"id": "x", **plain, "answer": None}
    assert load_examples(path, TASK, None)[1] == {**second, "answer": "B", "num_choices": 2, "topic": "t"}
    assert load_examples(path, None, None, limit=1) == [first]


@pytest.mark.parametrize("drawn", [{}, {"num_samples": 3, "num_validation": 0, "num_test": 0}])
def test_a_task_that_reads_prompts_prepares_rows_once(drawn, tmp_path):
    path = french(tmp_path, filters={"language": "en"})
    raw = [{"instruction": f"Q{i}", "input": "", "output": f"x{i}", "language": "en"} for i in range(3)]
    data = write(tmp_path, [*raw, {**raw[0], "language": "de"}])
    options = PrepareOptions(path, str(tmp_path / "new"), data=str(data), **drawn)
    prepare(options)
    task, written = load_task(path), tmp_path / "new" / "train.json"
    for source in (data, written):  # raw rows go through the task, prepared ones are used as they are
        examples = load_examples(source, task, None)
        assert sorted(example["instruction"] for example in examples) == [f"Into French: Q{i}" for i in range(3)]
        assert sorted(example["output"] for example in examples) == [f"It is x{i}." for i in range(3)]
    with pytest.raises(MolaError, match="did not go through the task `french` before"):
        prepare(replace(options, data=str(written), output_dir=str(tmp_path / "twice")))
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("drawn", [{}, {"num_samples": 2, "num_validation": 0, "num_test": 0}])
def test_replaced_columns_are_named_in_a_warning(drawn, tmp_path, capsys):
    layout = {"columns": ["question", "label"], "instruction": "{question}", "output": "{answer}"}
    layout |= {"answer": {"column": "label", "words": {"a": "Yes", "b": "No"}}, "answer_pattern": "(Yes|No)"}
    path = french(tmp_path, **layout, metric="accuracy")
    row = {"label": "a", "answer": "because", "input": "a text"}
    raw = write(tmp_path, [{"question": f"Q{number}", **row} for number in range(3)])
    prepare(PrepareOptions(path, str(tmp_path / "new"), data=str(raw), **drawn))
    assert "warning: `answer`, `input` of the source is not kept" in capsys.readouterr().out


def test_nan_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "score": NaN}\n')
    with pytest.raises(MolaError, match=r"row 0 of train\.json: .*Write null instead"):
        prepare(PrepareOptions(french(tmp_path), str(tmp_path / "new"), data=str(path)))


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_repeated_column_is_refused(ending, tmp_path):
    row = '{"instruction": "a", "output": "b", "output": "c"}'
    (tmp_path / f"rows{ending}").write_text(f"[{row}]" if ending == ".json" else row)
    with pytest.raises(MolaError, match="the name 'output' occurs twice in one object"):
        load_examples(tmp_path / f"rows{ending}", None, None)


def test_an_answer_column_that_no_task_reads_may_hold_anything(tmp_path):
    rows = [{"instruction": "Add 40 and 2", "output": "It is 42", "answer": 42}]
    path, task = write(tmp_path, rows), replace(TASK, answer=None, fields={}, groups=())
    assert load_examples(path, None, None)[0]["answer"] is None
    assert load_examples(path, task, None)[0]["answer"] is None
    with pytest.raises(MolaError, match="`answer` must be text: got 42"):
        load_examples(path, TASK, None)


@pytest.mark.parametrize("changes", [{"output": None}, {"instruction": ["a"]}, {"input": 1}, {"answer": 0}])
def test_prepared_row_with_a_wrong_value_is_named(tmp_path, changes):
    row = {"id": "r1", "instruction": "a", "input": "", "output": "b"}
    name, value = next(iter(changes.items()))
    with pytest.raises(MolaError) as caught:
        load_examples(write(tmp_path, [{**row, **changes}]), TASK, None)
    assert f"row `r1`: `{name}` must be text: got {value!r}" in str(caught.value)


def test_limit_counts_rows_after_the_filters(tmp_path, caplog):
    rows = [question(0, image={"bytes": "x"}), question(1), question(2), question(3)]
    path = write(tmp_path, rows)
    with caplog.at_level(logging.INFO, logger="mola"):
        examples = load_examples(path, TASK, "test", limit=2)
    # Ids tell the position in the source, whatever was filtered.
    assert [example["id"] for example in examples] == ["test-1", "test-2"]
    assert "left out 1 of 4 rows" in caplog.text
    assert len(load_examples(path, TASK, "test", limit=99)) == 3


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(tmp_path, limit):
    with pytest.raises(MolaError, match=f"`limit` must be a positive integer: got {limit}"):
        load_examples(write(tmp_path, [question(1)]), TASK, None, limit=limit)


def test_missing_column_names_column_file_and_columns(tmp_path):
    row = question(1)
    del row["hint"]
    path = write(tmp_path, [question(0), row])
    with pytest.raises(MolaError, match=r"line 2 of .*a.jsonl`: .* no column `hint`, .* columns are question, choices"):
        load_examples(path, TASK, None)


def test_rows_of_no_known_format_need_a_task(tmp_path):
    with pytest.raises(MolaError, match=r"no known format.* has ask, reply\. Rename .* `prompt` and `completion`"):
        load_examples(write(tmp_path, [{"ask": "Why?", "reply": "So."}]), None, None)


def test_duplicate_ids_are_an_error(tmp_path):
    path = write(tmp_path, [question(0, id=1), question(1, id="1")])
    with pytest.raises(MolaError, match="`1` occurs twice"):
        load_examples(path, TASK, None)
    with pytest.raises(MolaError, match="`1` occurs twice"):
        run(tmp_path, data=str(path))


def test_nothing_left_after_the_filters_is_an_error(tmp_path):
    path = write(tmp_path, [question(0, image="x")])
    with pytest.raises(MolaError, match="left out all 1 rows"):
        load_examples(path, TASK, None)
    with pytest.raises(MolaError, match="left out every row"):
        run(tmp_path, data=str(path))
    assert not (tmp_path / "out").exists()


def test_prepare_writes_json_and_dataset(tmp_path, capsys):
    rows = [question(0, id="q0"), question(1, id="q1", image={"bytes": "x"}), question(2, id="q2", grade="2")]
    train, test = write(tmp_path, rows), write(tmp_path, [question(7, id="q7")], "b.jsonl")
    result = run(tmp_path, data=f"train={train}, test={test}")
    out = tmp_path / "out"
    assert result["splits"] == {"train": {"rows": 2, "filtered": 1}, "test": {"rows": 1, "filtered": 0}}
    assert result["output_dir"] == str(out)
    assert "train: 2 rows, 1 left out" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["dataset.hf", "test.json", "train.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out"]

    text = (out / "train.json").read_text(encoding="utf-8")
    assert text.isascii()
    assert "\n" not in text
    written = json.loads(text)
    assert list(written[0]) == [
        *("question", "choices", "answer", "hint", "image", "id", "grade", "input", "instruction", "output")
    ]
    assert [row["answer"] for row in written] == ["A", "C"]
    assert written[0]["grade"] is None
    assert read_rows(out / "dataset.hf", "train") == written
    saved = datasets.load_from_disk(str(out / "dataset.hf"))
    assert saved["train"].features == saved["test"].features

    expected = load_examples(train, TASK, "train")
    assert load_examples(out / "dataset.hf", TASK, "train") == expected
    assert load_examples(out / "train.json", TASK, None) == expected


def test_prepare_twice_gives_the_same(tmp_path):
    data = str(write(tmp_path, [question(0), question(1)]))
    run(tmp_path, data=data)
    first = (tmp_path / "out" / "train.json").read_bytes()
    run(tmp_path, data=str(tmp_path / "out" / "dataset.hf"), output_dir=str(tmp_path / "again"))
    assert (tmp_path / "again" / "train.json").read_bytes() == first


def test_wrong_row_is_named_by_its_place_in_the_source(tmp_path):
    path = write(tmp_path, [question(0, image="x"), question(1), question(2, choices="ab")])
    with pytest.raises(MolaError, match=r"line 3 of `.*a\.jsonl`: .*`choices` must be a list"):
        load_examples(path, TASK, None)
    with pytest.raises(MolaError, match=r"row 2 of `train`: .*`choices` must be a list"):
        run(tmp_path, data=str(path))


def test_prepare_counts_instructions_in_two_splits(tmp_path, capsys):
    train = write(tmp_path, [question(0), question(1)])
    result = run(tmp_path, data=f"train={train},test={write(tmp_path, [question(1)], 'b.jsonl')}")
    assert result["shared_instructions"] == 1
    assert "1 instructions occur in more than one split" in capsys.readouterr().out


def test_output_dir_is_replaced_only_on_request(tmp_path):
    data = str(write(tmp_path, [question(0)]))
    run(tmp_path, data=f"train={data},test={data}")
    with pytest.raises(MolaError, match=r"`output_dir` must be empty.*`overwrite_output_dir`"):
        run(tmp_path, data=data)
    run(tmp_path, data=data, overwrite_output_dir=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset.hf", "train.json"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_folder_with_other_files_is_never_replaced(tmp_path):
    data = str(write(tmp_path, [question(0)]))
    with pytest.raises(MolaError, match=r"only if `mola prepare` wrote it.* holds a.jsonl"):
        run(tmp_path, data=data, output_dir=str(tmp_path), overwrite_output_dir=True)
    with pytest.raises(MolaError, match="`output_dir` must be a folder"):
        run(tmp_path, data=data, output_dir=data)
    (tmp_path / "empty").mkdir()
    run(tmp_path, data=data, output_dir=str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "train.json").exists()


def test_folder_with_another_json_file_is_never_replaced(tmp_path):
    data = str(write(tmp_path, [question(0)]))
    run(tmp_path, data=data)
    (tmp_path / "out" / "my_results.json").write_text("{}")
    with pytest.raises(MolaError, match=r"only if `mola prepare` wrote it.* my_results.json"):
        run(tmp_path, data=data, overwrite_output_dir=True)
    assert (tmp_path / "out" / "my_results.json").read_text() == "{}"


@pytest.mark.parametrize("content", [None, '{"splits": 3}'])
def test_folder_whose_splits_are_unknown_is_never_replaced(tmp_path, content):
    data = str(write(tmp_path, [question(0)]))
    (tmp_path / "out" / "dataset.hf").mkdir(parents=True)
    if content is not None:
        (tmp_path / "out" / "dataset.hf" / "dataset_dict.json").write_text(content)
    with pytest.raises(MolaError, match="only if `mola prepare` wrote it"):
        run(tmp_path, data=data, overwrite_output_dir=True)


def test_failed_prepare_leaves_the_old_folder(tmp_path):
    data = str(write(tmp_path, [question(0)]))
    run(tmp_path, data=data)
    before = (tmp_path / "out" / "train.json").read_bytes()
    mixed = write(tmp_path, [question(0, extra="text"), question(1, extra=[1])], "b.jsonl")
    with pytest.raises(MolaError, match="one kind in every column"):
        run(tmp_path, data=str(mixed), overwrite_output_dir=True)
    assert (tmp_path / "out" / "train.json").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_default_sizes_of_the_sample_can_be_generated(tmp_path):
    result = prepare(PrepareOptions("sample", str(tmp_path / "data")))
    assert {name: split["rows"] for name, split in result["splits"].items()} == SAMPLE_SIZES
    assert result["shared_instructions"] == 0


def test_sample_is_deterministic_and_splits_are_disjoint(tmp_path):
    sizes = {"train_size": 40, "validation_size": 10, "test_size": 20}
    result = run(tmp_path, task="sample", **sizes)
    assert [count["rows"] for count in result["splits"].values()] == [40, 10, 20]
    assert result["shared_instructions"] == 0
    run(tmp_path, task="sample", output_dir=str(tmp_path / "same"), **sizes)
    run(tmp_path, task="sample", output_dir=str(tmp_path / "other"), seed=1, **sizes)
    texts = [(tmp_path / name / "train.json").read_text() for name in ("out", "same", "other")]
    assert texts[0] == texts[1] != texts[2]
    assert len(load_examples(tmp_path / "out" / "dataset.hf", TASK, "test")) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sample", "data": "x.json"}, "`data` has no effect with the task `sample`"),
        ({"data": "x.json", "train_size": 5}, "`train_size` has no effect without the task `sample`: got 5"),
        ({"data": "x.json", "seed": 5}, "`seed` has no effect without `num_samples` or the task `sample`: got 5"),
        ({"task": "unknown"}, "`task` must be one of"),
        ({"data": "train=,test=b"}, "`data` must be train=A"),
        ({"data": "train=a,train=b"}, "different names"),
        ({"data": "train=missing.json"}, "`missing.json` does not exist"),
    ],
)
def test_wrong_option_is_explained(tmp_path, options, message):
    with pytest.raises(MolaError, match=message):
        run(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_task_of_the_user_needs_data(tmp_path):
    with pytest.raises(MolaError, match="`data` is needed for the task `french`"):
        run(tmp_path, task=french(tmp_path))


def test_raw_rows_that_look_prepared_are_refused_if_the_filters_leave_them_out(tmp_path):
    task = load_task(french(tmp_path, filters={"language": "en"}))
    rows = [{"id": i, "instruction": f"Q{i}", "input": "", "output": "x", "language": "en"} for i in range(3)]
    assert len(load_examples(write(tmp_path, rows), task, None)) == 3
    rows[1]["language"] = "de"
    with pytest.raises(
        MolaError, match="Row 1 .*`language` is 'de', which.*`french` reject.*rename or drop its column"
    ):
        load_examples(write(tmp_path, rows), task, None)


def test_rows_do_not_go_through_a_task_that_reads_input_twice(tmp_path):
    task = french(tmp_path, columns=["input", "target"], instruction="{input}", output="{target}")
    raw = write(tmp_path, [{"input": f"Q{i}", "target": f"x{i}"} for i in range(3)])
    prepare(PrepareOptions(task, str(tmp_path / "new"), data=str(raw)))
    (written,) = (tmp_path / "new").glob("*.json")
    assert [row["instruction"] for row in read_rows(written)] == ["Q0", "Q1", "Q2"]
    with pytest.raises(MolaError, match="did not go through the task `french` before"):
        prepare(PrepareOptions(task, str(tmp_path / "again"), data=str(written)))


def test_a_split_without_rows_stays(tmp_path):
    prepare(PrepareOptions("sample", str(tmp_path / "sample"), train_size=3, validation_size=0, test_size=2))
    data = str(tmp_path / "sample" / "dataset.hf")
    layout = {"columns": ["instruction", "answer"], "instruction": "{instruction}", "output": "{answer}"}
    splits = {
        name: datasets.load_from_disk(data)[name].remove_columns(["input", "output"])
        for name in ("train", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "raw"), num_shards={"train": None, "validation": 1})
    result = prepare(PrepareOptions(french(tmp_path, **layout), str(tmp_path / "new"), data=str(tmp_path / "raw")))
    assert result["splits"] == {"train": {"rows": 3, "filtered": 0}, "validation": {"rows": 0, "filtered": 0}}

"""`mola prepare --num_samples`."""

import csv
import gzip
import json
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from mola.data import sampling
from mola.data.examples import load_examples
from mola.data.prepare import PrepareOptions, prepare
from mola.data.read import read_rows
from mola.data.tasks import load_task
from mola.errors import MolaError
from tests.data.orca import files_of, orca_rows, write_orca
from tests.grids import slow

SMALL = {"num_samples": 40, "num_validation": 10, "num_test": 10}


def write(folder, rows, name="a.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def run(folder, data, out="out", **options):
    settings = {"task": "openorca", "output_dir": str(folder / out), "data": str(data), **SMALL, **options}
    return prepare(PrepareOptions(**settings))


def splits_of(folder, out="out"):
    return datasets.load_from_disk(str(folder / out / "dataset.hf"))


def test_sizes_columns_and_order(tmp_path, capsys):
    rows = list(orca_rows(300))
    result = run(tmp_path, write(tmp_path, rows))
    saved = splits_of(tmp_path)
    assert {split: len(part) for split, part in saved.items()} == {"train": 40, "validation": 10, "test": 10}
    assert saved["train"].column_names == [*rows[0], "input", "instruction", "output"]
    positions = [int(row_id.split(".")[1]) for row_id in saved["train"]["id"]]
    assert positions != sorted(positions)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("dataset.hf", "test.json", "train.json", "validation.json")
    ]
    for split in saved:
        assert read_rows(tmp_path / "out" / f"{split}.json") == saved[split].to_list()
    row = saved["train"][0]
    assert row["output"] == (row["question"].strip() + "\n" + row["response"]).strip()
    assert row["instruction"] is None
    assert result["splits"]["train"] == {"rows": 40, "filtered": 0}
    assert result["source"] == {
        **{"rows": 300, "candidates": 300, "filtered": 0, "blank": 0, "duplicates": 0, "repeated_ids": 0, "groups": 4}
    }
    assert "source: 300 rows" in capsys.readouterr().out


def test_groups_keep_their_shares(tmp_path, capsys):
    rows = list(orca_rows(1000))
    there = Counter(row["id"].split(".")[0] for row in rows)
    run(tmp_path, write(tmp_path, rows), num_samples=500, num_validation=50, num_test=20)
    for split, part in splits_of(tmp_path).items():
        drawn = Counter(row_id.split(".")[0] for row_id in part["id"])
        for group, count in there.items():
            assert abs(drawn[group] - count * len(part) / 1000) < 1, (split, group)
    assert "4 groups, each keeps its share" in capsys.readouterr().out


def test_validation_and_test_are_1000_rows_by_default(tmp_path):
    rows = [{"sentence": f"s {number}", "label": 0} for number in range(2500)]
    run(tmp_path, write(tmp_path, rows), task="cola", num_samples=500, num_validation=None, num_test=None)
    assert [len(part) for part in splits_of(tmp_path).values()] == [500, 1000, 1000]


def test_split_of_size_0_is_not_written(tmp_path):
    run(tmp_path, write_orca(tmp_path / "a.jsonl", 50), num_validation=0)
    assert list(splits_of(tmp_path)) == ["train", "test"]
    assert not (tmp_path / "out" / "validation.json").exists()


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path):
    data = write_orca(tmp_path / "a.jsonl", 200)
    for out, seed in (("one", 3), ("two", 3), ("other", 4)):
        run(tmp_path, data, out, seed=seed)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert files_of(tmp_path / "one")["train.json"] != files_of(tmp_path / "other")["train.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "one", "other", "two"]


def test_equal_texts_count_as_one_row(tmp_path, capsys):
    rows = list(orca_rows(60))
    copies = [{**row, "id": f"t0.{1000 + index}"} for index, row in enumerate(rows[:25])]
    result = run(tmp_path, write(tmp_path, [*rows, *copies]))
    assert result["source"]["duplicates"] == 25
    assert result["source"]["candidates"] == 60
    outputs = [row["output"] for part in splits_of(tmp_path).values() for row in part]
    assert len(set(outputs)) == len(outputs) == 60
    assert "25 with a text that an earlier row has" in capsys.readouterr().out


def test_rows_with_a_repeated_id_are_left_out(tmp_path):
    rows = list(orca_rows(62))
    rows[61]["id"] = rows[0]["id"]
    result = run(tmp_path, write(tmp_path, rows), num_samples=41)
    assert result["source"]["repeated_ids"] == 1
    assert len(load_examples(tmp_path / "out" / "dataset.hf", load_task("openorca"), "train")) == 41


@pytest.mark.parametrize("changes", [{"question": " \n"}, {"response": None}])
def test_rows_without_text_are_counted_and_not_drawn(tmp_path, changes):
    rows = list(orca_rows(61))
    rows[5] |= changes
    result = run(tmp_path, write(tmp_path, rows))
    assert result["source"]["blank"] == 1
    assert all(rows[5]["id"] not in part["id"] for part in splits_of(tmp_path).values())


def test_filtered_rows_are_counted_and_not_drawn(tmp_path):
    rows = [
        {"question": f"q {n}", "choices": ["a", "b"], "answer": 0, "hint": "", "image": "x" if n % 3 == 0 else None}
        for n in range(30)
    ]
    sizes = {"num_samples": 18, "num_validation": 1, "num_test": 1}
    result = run(tmp_path, write(tmp_path, rows), task="scienceqa", **sizes)
    assert result["source"]["filtered"] == 10
    assert all(row["image"] is None for part in splits_of(tmp_path).values() for row in part)


def test_instructions_in_two_splits_are_counted(tmp_path, capsys):
    task = {"name": "t", "version": 1, "template": "alpaca", "columns": ["q", "a"], "instruction": "{q}"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**task, "output": "{a}"}))
    data = write(tmp_path, [{"q": "same", "a": f"a {number}"} for number in range(60)])
    result = run(tmp_path, data, task=str(tmp_path / "t.yaml"))
    assert result["shared_instructions"] == 1
    assert "1 instructions occur in more than one split" in capsys.readouterr().out


def test_too_few_rows_names_all_numbers(tmp_path):
    rows = list(orca_rows(62))
    rows[3]["question"] = ""
    rows[4] |= {"question": rows[0]["question"], "response": rows[0]["response"]}
    data = write(tmp_path, rows)
    with pytest.raises(MolaError) as caught:
        run(tmp_path, data, num_samples=41)
    for part in (
        "at most 60 rows together: got 41 for train + 10 for validation + 10 for test = 61",
        "has 62 rows, left out: 0 by the task's filters, 1 without text, 1 with a text that an earlier row has",
    ):
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    run(tmp_path, data, num_samples=40)


def test_ids_without_the_separator_are_groups_of_their_own(tmp_path):
    rows = [{**row, "id": f"x{index}"} for index, row in enumerate(orca_rows(80))]
    assert run(tmp_path, write(tmp_path, rows))["source"]["groups"] == 80
    assert [len(part) for part in splits_of(tmp_path).values()] == [40, 10, 10]


@pytest.mark.parametrize("kind", ["parquet", "split", *slow("jsonl.gz", "json", "csv", "folder")])
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind):
    rows = list(orca_rows(120))
    expected = run(tmp_path, write(tmp_path, rows), "expected")
    data = tmp_path / f"data.{kind}"
    if kind == "jsonl.gz":
        data.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows)))
    elif kind == "json":
        data.write_text(json.dumps(rows))
    elif kind == "csv":
        with data.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data, row_group_size=17)
    else:
        table = datasets.Dataset.from_list(rows)
        saved = table if kind == "folder" else datasets.DatasetDict(test=table.select([0]), train=table)
        saved.save_to_disk(str(data))
    result = run(tmp_path, data)
    assert {**result, "output_dir": ""} == {**expected, "output_dir": ""}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_first_pass_reads_only_the_columns_of_the_task(tmp_path):
    # A column that cannot be written does not matter where it is not read; here it is, in the second pass.
    table = pyarrow.table({"sentence": ["a", "b", "c"], "label": [0, 1, 0], "other": [b"x", b"y", b"z"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    sizes = {"num_samples": 2, "num_validation": 0, "num_test": 0}
    with pytest.raises(MolaError, match="must hold JSON values"):
        run(tmp_path, tmp_path / "a.parquet", task="cola", **sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    with pytest.raises(MolaError, match="at most 3 rows"):
        run(tmp_path, tmp_path / "a.parquet", task="cola", **{**sizes, "num_samples": 4})


def test_source_that_changes_between_the_passes_is_an_error(tmp_path, monkeypatch):
    data = write_orca(tmp_path / "a.jsonl", 60)
    draw = sampling.draw

    def change(*arguments):
        write_orca(data, 60, seed=1)
        return draw(*arguments)

    monkeypatch.setattr(sampling, "draw", change)
    with pytest.raises(MolaError, match="must not change while it is read: line 1"):
        run(tmp_path, data)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1: got 0"),
        ({"num_test": -1}, "`num_test` must be at least 0: got -1"),
        ({"seed": -1}, "`seed` must be at least 0: got -1"),
        ({"num_samples": None}, "`num_validation` has no effect without `num_samples`: got 10"),
        ({"task": "sample", "data": None}, "`num_samples` has no effect with the task `sample`"),
        ({"data": "missing.jsonl"}, "`missing.jsonl` does not exist"),
        ({"data": "train=a.jsonl,test=b.jsonl"}, "must be a single source to draw samples from"),
    ],
)
def test_wrong_option_is_explained(tmp_path, options, message):
    data = write_orca(tmp_path / "a.jsonl", 60)
    with pytest.raises(MolaError, match=message):
        run(tmp_path, **{"data": data, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": None}, "`id` must be text or an integer, since samples are drawn in groups by it: got None"),
        ({"question": 4}, "`question` must be text: got 4"),
    ],
)
def test_wrong_row_is_named(tmp_path, changes, message):
    rows = list(orca_rows(60))
    rows[7] |= changes
    with pytest.raises(MolaError, match=message):
        run(tmp_path, write(tmp_path, rows))


def test_missing_column_is_named_with_the_columns_of_the_source(tmp_path):
    rows = [{"id": "a.1", "question": "q", "more": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for data in (write(tmp_path, rows), tmp_path / "a.parquet"):
        with pytest.raises(
            MolaError, match=r"(line 1|row 0) of .* no column `response`.* columns are id, question, more"
        ):
            run(tmp_path, data)


def test_source_with_splits_but_no_train_is_refused(tmp_path):
    part = datasets.Dataset.from_list(list(orca_rows(60)))
    datasets.DatasetDict(a=part, b=part).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(MolaError, match="must have a split `train` .* has a, b"):
        run(tmp_path, tmp_path / "d")
    run(tmp_path, tmp_path / "d" / "a")

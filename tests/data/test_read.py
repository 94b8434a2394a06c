import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola.data.read import read_rows, split_names, stream_rows
from mola.errors import MolaError

ROWS = [
    {"id": "1", "question": "Größe?\u2028x", "choices": ["a", "b"], "answer": 1, "hint": None},
    {"id": "2", "question": "", "choices": ["c", "d", "e"], "answer": 0, "hint": "h"},
]


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def json_lines(rows=ROWS):
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8")


def saved(folder, **splits):
    dataset = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    dataset.save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
def test_json_files_keep_values_as_they_are(tmp_path, name, mark):
    data = json_lines() if "jsonl" in name else json.dumps(ROWS, indent=1).encode()
    path = write(tmp_path / name, mark + data)
    assert read_rows(path) == read_rows(str(path), "ignored") == ROWS
    assert split_names(path) == []


@pytest.mark.skipif(not hasattr(pyarrow, "json_"), reason="this pyarrow has no type for JSON texts")
def test_values_of_mixed_kinds_are_decoded(tmp_path):
    """Datasets stores them as texts in JSON, also inside of lists and mappings."""
    mixed = ["It is\nfour", 4, None, {"a": [1]}]
    encoded = pyarrow.array([None if value is None else json.dumps(value) for value in mixed]).cast(pyarrow.json_())
    lists = pyarrow.ListArray.from_arrays([0, 2, 2, 3, 4], encoded)
    inside = pyarrow.StructArray.from_arrays([encoded, pyarrow.array([1, 2, 3, 4])], ["any", "number"])
    table = pyarrow.table({"output": encoded, "choices": lists, "more": inside, "plain": ["a", "b", "c", "d"]})
    expected = [
        {"output": value, "choices": choices, "more": {"any": value, "number": number}, "plain": plain}
        for value, choices, number, plain in zip(
            mixed, [mixed[:2], [], mixed[2:3], mixed[3:]], (1, 2, 3, 4), "abcd", strict=True
        )
    ]
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == expected


@given(rows=st.lists(st.dictionaries(st.text(), st.none() | st.text() | st.lists(st.text())), min_size=1))
def test_json_lines_round_trip(tmp_path_factory, rows):
    path = write(tmp_path_factory.mktemp("rows") / "a.jsonl", json_lines(rows))
    assert read_rows(path) == rows


def test_parquet_keeps_lists_and_none_and_ignores_folder_names(tmp_path):
    folder = tmp_path / "split=train"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    assert read_rows(folder / "a.parquet") == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_values_are_text(name, tmp_path):
    rows = [{"sentence": 'a, "b"\nc', "label": "1"}, {"sentence": "NA", "label": ""}]
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", newline="") as file:
        writer = csv.DictWriter(file, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(rows)
    assert read_rows(tmp_path / name) == rows


def test_saved_datasets_are_read_and_left_alone(tmp_path):
    folder = saved(tmp_path / "d.hf", train=ROWS, test=ROWS[:1])
    before = sorted(folder.rglob("*"))
    assert split_names(folder) == ["train", "test"]
    assert read_rows(folder, "train") == ROWS
    assert read_rows(folder, "test") == ROWS[:1]
    assert sorted(folder.rglob("*")) == before
    assert read_rows(folder / "train") == ROWS
    assert split_names(folder / "train") == []


def test_images_are_not_decoded(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "id": datasets.Value("string")})
    rows = {"image": [{"bytes": b"no image", "path": None}, None], "id": ["1", "2"]}
    table = pyarrow.table(rows, schema=features.arrow_schema)
    datasets.Dataset(table, datasets.DatasetInfo(features=features)).save_to_disk(str(tmp_path / "d"))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for source in (tmp_path / "d", tmp_path / "a.parquet"):
        assert [row["image"] for row in read_rows(source)] == rows["image"]


def test_unknown_split_lists_the_splits(tmp_path):
    folder = saved(tmp_path / "d.hf", train=ROWS, test=ROWS)
    for split in ("validation", None):
        with pytest.raises(
            MolaError, match=f"`split` must be one of train, test .* got {split!r}. Choose one, or pass its folder"
        ):
            read_rows(folder, split)
    assert read_rows(saved(tmp_path / "one.hf", train=ROWS)) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"", "at least one row"),
        ("a.json", b"[]", "at least one row"),
        ("a.jsonl", b"\n \n", "at least one row"),
        ("a.csv", b"x,y\n", "at least one row"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "line 2: Expecting value"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "must be called .jsonl"),
        ("a.json", b'{"a": 1}', "must hold a JSON array of rows: got a dict"),
        ("a.json", b"[1]", "row 0 of .* is a int"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2', "line 3: "),
        ("a.jsonl", b'{"a": 1}\n\n["a"]', "line 3 of .* is a list"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "\xff"}', "must be text in UTF-8: line 2"),
        ("a.csv", b"x,y\n1,2\n1\n", "2 values in every line.* line 3"),
        ("a.csv", b"x,y\n1,2,3\n", "2 values in every line.* line 2"),
        ("a.csv", b"x,x\n1,2\n", "different column names: got x, x"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.parquet.gz", b"", "must end in one of"),
        ("a.txt", b"text", "must end in one of .json, .jsonl, .csv, .parquet"),
    ],
)
def test_damaged_file_is_explained(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(MolaError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_damaged_saved_dataset_is_explained(tmp_path):
    folder = saved(tmp_path / "d.hf", train=ROWS)
    next((folder / "train").glob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(MolaError, match="cannot be read"):
        read_rows(folder, "train")


def test_folder_without_data_lists_its_files(tmp_path):
    write(tmp_path / "notes.txt", b"[]")
    for call in (read_rows, split_names):
        with pytest.raises(MolaError, match="holds notes.txt. Pass one"):
            call(tmp_path)


@pytest.mark.parametrize("where", ["", "data"])
def test_folder_of_files_has_the_splits_that_their_names_say(tmp_path, where):
    (tmp_path / where).mkdir(exist_ok=True)
    write(tmp_path / where / "train-0.jsonl", json_lines())
    write(tmp_path / where / "train-1.jsonl", json_lines())
    write(tmp_path / where / "validation.json", json.dumps(ROWS[:1]).encode())
    write(tmp_path / "README.md", b"# Rows")
    assert split_names(tmp_path) == ["train", "validation"]
    assert read_rows(tmp_path, "train") == [*ROWS, *ROWS]
    assert read_rows(tmp_path, "validation") == ROWS[:1]
    with pytest.raises(MolaError, match="must be one of train, validation"):
        read_rows(tmp_path)


def test_folder_of_other_names_is_one_split(tmp_path):
    write(tmp_path / "chats.jsonl", json_lines())
    assert (split_names(tmp_path), read_rows(tmp_path)) == (["train"], ROWS)


@pytest.mark.parametrize(
    "path", ["missing", "data/missing.jsonl", "a/b/c", "a/b:", "a/b:c/d", "data/x.json.gz", "../up", "d/e.hf"]
)
def test_missing_path_is_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    for call in (read_rows, split_names):
        with pytest.raises(MolaError, match=f"`{path}` does not exist"):
            call(path)


def test_hub_name_is_passed_to_datasets(monkeypatch):
    asked = []

    def load(*names, split=None):
        asked.append((*names, split))
        dataset = datasets.Dataset.from_list(ROWS)
        return dataset if split else datasets.DatasetDict(train=dataset, test=dataset)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *names: [*names, "train"])
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["cola"])
    assert read_rows("owner/name-1.0", "train") == ROWS
    assert asked == [("owner/name-1.0", "train")]
    assert split_names("owner/name-1.0") == ["owner/name-1.0", "train"]
    assert read_rows("owner/name:cola", "train") == ROWS
    assert asked[1:] == [("owner/name", "cola", "train")]
    assert split_names("owner/name:cola") == ["owner/name", "cola", "train"]
    for source, names in {"owner/name:test": ["owner/name"], "owner/name:cola:test": ["owner/name", "cola"]}.items():
        assert (read_rows(source, "train"), split_names(source)) == (ROWS, [])
        assert asked[-1] == (*names, "test")
    with pytest.raises(MolaError, match="must be one of train, test .* Choose one."):
        read_rows("owner/name-1.0")


def test_hub_failure_names_both_readings(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    for call in (read_rows, split_names):
        with pytest.raises(MolaError, match=r"no file or folder `owner/name` exists.*ConnectionError: offline"):
            call("owner/name")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_lines_are_read_one_at_a_time(tmp_path, name):
    lines = b"x\n1\n2\n" if name == "a.csv" else b'{"x": "1"}\n{"x": "2"}\n'
    rows = stream_rows(write(tmp_path / name, lines + b'[broken, "\n'))
    assert [next(rows), next(rows)] == [{"x": "1"}, {"x": "2"}]
    with pytest.raises(MolaError, match="a\\."):
        next(rows)


def test_columns_that_are_not_needed_are_left_out(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    folder = saved(tmp_path / "d.hf", train=ROWS)
    for source in (tmp_path / "a.parquet", folder):
        rows = list(stream_rows(source, "train", columns={"id", "answer", "nosuch"}))
        assert rows == [{"id": row["id"], "answer": row["answer"]} for row in ROWS]
        assert list(stream_rows(source, "train", columns=["nosuch"])) == ROWS
    assert list(stream_rows(write(tmp_path / "a.jsonl", json_lines()), columns=["id"])) == ROWS


def test_saved_dataset_with_more_rows_than_one_batch_keeps_their_order(tmp_path):
    rows = [{"number": number} for number in range(2500)]
    assert list(stream_rows(saved(tmp_path / "d", train=rows), "train")) == rows


def test_hub_dataset_is_streamed(monkeypatch):
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(stream_rows("owner/name", "train", columns=["id"])) == [{"id": "1"}, {"id": "2"}]
    assert asked == [("owner/name", {"split": "train", "streaming": True})]

"""Data sets: JSON, JSON lines, CSV, Parquet, saved datasets, each also damaged."""

import gzip
import json
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola.data.read import read_rows, split_names
from mola.data.source import single_source, source_splits
from tests.fuzz.checking import fuzz, survives
from tests.fuzz.documents import JSON_TEXTS, TEXTS, broken, damaged, files, line_files

ROWS = [{"id": 1, "question": "Why?", "choices": ["a", "b"], "answer": 1, "hint": None}]
ROWS += [{"id": 2, "question": "é", "answer": 0}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def put(path, content, compress):
    if compress:
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content, 1)
    path.write_bytes(content)
    return path


@fuzz
@given(files(ROWS), st.booleans())
def test_json(folder, content, compress):
    survives(read_rows, put(folder / "rows.json", content, compress))


@fuzz
@given(line_files(ROWS), st.booleans())
def test_json_lines(folder, content, compress):
    survives(read_rows, put(folder / "rows.jsonl", content, compress))


CELLS = st.sampled_from(['"', '""', ",", "\n", "\r", "\r\n", "\0", "a", "1", "é", "=1+1", "x" * 200_000]) | TEXTS


@fuzz
@given(st.lists(CELLS, max_size=12).map(lambda cells: "a,b\n" + "".join(cells)).flatmap(damaged), st.booleans())
def test_csv(folder, content, compress):
    survives(read_rows, put(folder / "rows.csv", content, compress))


@fuzz
@given(
    st.binary(max_size=100).map(gzip.compress).flatmap(broken) | st.binary(max_size=50),
    st.sampled_from(["json", "jsonl", "csv"]),
)
def test_gzip(folder, content, ending):
    path = folder / f"rows.{ending}.gz"
    path.write_bytes(content)
    survives(read_rows, path)


@pytest.fixture(scope="module")
def parquet():
    sink = pa.BufferOutputStream()
    table = pa.table({"a": ["x", "y", None], "b": [[1], [2, 3], []], "c": [{"d": 1.5}] * 3, "e": [b"\xff", b"", None]})
    pq.write_table(table, sink, compression="snappy")
    return sink.getvalue().to_pybytes()


@fuzz
@given(data=st.data())
def test_parquet(folder, parquet, data):
    path = folder / "rows.parquet"
    path.write_bytes(data.draw(broken(parquet) | st.binary(max_size=50)))
    survives(read_rows, path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    splits = {name: datasets.Dataset.from_list([{"a": name, "b": [1, 2]}] * 3) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "it"))
    return folder / "it"


@fuzz
@given(data=st.data())
def test_saved_dataset(folder, saved, data):
    place = folder / "saved"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(saved, place)
    victim = data.draw(st.sampled_from(sorted(file.relative_to(place) for file in place.rglob("*") if file.is_file())))
    original = (place / victim).read_bytes()
    if victim.suffix == ".json":
        content = data.draw(files(json.loads(original)))
    else:
        content = data.draw(broken(original))
    if data.draw(st.integers(0, 9)) == 0:
        (place / victim).unlink()
    else:
        (place / victim).write_bytes(content)
    survives(split_names, place)
    survives(read_rows, place, data.draw(st.sampled_from(["train", "test", "other", None, ""])))


NAMES = ["train=a.json", "train=a,test=b", "=", "train=", ",", "a=\0", "n" * 5000, "n" * 5000 + ".json", "\0"]
NAMES = TEXTS | st.sampled_from([*NAMES, "~nobody/x.json", *JSON_TEXTS])


@fuzz
@given(NAMES.filter(lambda name: "/" not in name or name.startswith(("/", "~"))))
def test_what_data_is_called(name):
    survives(source_splits, name)
    survives(single_source, name)
    survives(read_rows, name)

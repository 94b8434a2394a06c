import contextlib
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mola.data.spool import Spool
from mola.data.write import write_splits
from mola.errors import MolaError
from mola.files.folders import check_new_folder, complete_folder, new_folder

PROMPT = {"input": "", "instruction": "i", "output": "o"}


def test_empty_split_can_be_loaded_again(tmp_path):
    write_splits({"train": [{"a": 1, **PROMPT}], "test": []}, tmp_path / "out")
    saved = datasets.load_from_disk(str(tmp_path / "out" / "dataset.hf"))
    assert len(saved["test"]) == 0
    assert saved["test"].features == saved["train"].features
    assert (tmp_path / "out" / "test.json").read_text() == "[]"


# Half of a surrogate pair is a text for Python, but not for a file: see below.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
COLUMN = st.sampled_from(
    [st.none() | TEXT, st.lists(TEXT), st.none() | st.integers(-(2**63), 2**63 - 1), st.booleans()]
)


@settings(max_examples=25, deadline=None)  # every example writes files
@given(data=st.data(), kinds=st.lists(COLUMN, min_size=1, max_size=4), split_at=st.integers(0, 5))
def test_json_and_dataset_hold_what_was_put_in(tmp_path_factory, data, kinds, split_at):
    columns = st.fixed_dictionaries({f"c{index}": kind for index, kind in enumerate(kinds)})
    rows = [{**row, **PROMPT} for row in data.draw(st.lists(columns, min_size=1, max_size=6))]
    out = tmp_path_factory.mktemp("w") / "out"
    splits = {"a": rows[:split_at], "b": rows[split_at:]}
    write_splits(splits, out)
    saved = datasets.load_from_disk(str(out / "dataset.hf"))
    for name, expected in splits.items():
        assert json.loads((out / f"{name}.json").read_text()) == expected
        assert saved[name].to_list() == expected


def test_text_that_no_file_can_hold_is_an_error(tmp_path):
    with pytest.raises(MolaError, match="must hold valid text: `a`"):
        write_splits({"train": [{"a": "\ud800", **PROMPT}]}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_types_come_from_all_rows_however_many(tmp_path):
    with Spool(tmp_path / "rows", first=["z"], last=["y"]) as spool:
        for number in range(2500):
            spool.add({"y": 1, "a": None if number < 2400 else [0.5], "b": 1 if number % 2 else 2.5, "extra": None})
        schema = spool.schema()
        assert {name: str(schema.field(name).type) for name in schema.names} == {
            **{"z": "null", "a": "list<item: double>", "b": "double", "extra": "null", "y": "int64"}
        }
        assert schema.names == ["z", "a", "b", "extra", "y"]
        assert [row["b"] for row in spool.rows([2499, 0, 1])] == [1, 2.5, 1]
        assert [table.num_rows for table in spool.tables(range(2500))] == [1000, 1000, 500]


@pytest.mark.parametrize("other", ["text", [1], {"a": 1}, True])
def test_kinds_that_differ_after_many_rows_name_the_column(tmp_path, other):
    with Spool(tmp_path / "rows") as spool:
        for _ in range(1500):
            spool.add({"a": 1})
        spool.add({"a": other})
        with pytest.raises(MolaError, match="one kind in every column: `a`"):
            spool.schema()


def write_and_fail(folder):
    with complete_folder(folder) as (temporary, scratch):
        (temporary / "a").write_text("x")
        (scratch / "b").write_text("x")
        raise KeyError


def test_folder_appears_only_without_an_error(tmp_path):
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with complete_folder(tmp_path / "out") as (folder, _):
        (folder / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def write_two(folder):
    with complete_folder(folder) as (new, _):
        for name in ("dataset_dict.json", "a.json"):
            (new / name).write_text("fourth")


def files(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("place", ["mount", "working folder"])
def test_folder_that_has_to_stay_gets_the_files(tmp_path, monkeypatch, place):
    """A volume cannot be renamed, and a shell that works in a folder would stand in one that is gone."""
    folder = tmp_path / "out"
    folder.mkdir()
    if place == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    else:
        monkeypatch.chdir(folder)
    number = folder.stat().st_ino
    for text in ("first", "second"):
        with complete_folder(folder) as (new, scratch):
            (new / "dataset_dict.json").write_text(text)
            (new / f"{text}.json").write_text(text)
            (scratch / "left").write_text("")
        assert files(folder) == {"dataset_dict.json": text, f"{text}.json": text}
    with pytest.raises(KeyError):
        write_and_fail(folder)
    assert files(folder) == {"dataset_dict.json": "second", "second.json": "second"}
    replaced, move = [], os.replace

    def replace(path, target):
        replaced.append(Path(path).name)
        if Path(path).name == "dataset_dict.json" and Path(path).parent.suffix == ".tmp":
            raise OSError(28, "full")
        move(path, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(MolaError, match="full"):
        write_two(folder)
    assert replaced[:4] == ["dataset_dict.json", "second.json", "a.json", "dataset_dict.json"]  # what completes it last
    assert files(folder) == {"dataset_dict.json": "second", "second.json": "second"}
    for is_done in (False, True):  # an interrupt comes before a file is moved, or right after

        def interrupted(path, target, move=move, is_done=is_done):
            is_it = Path(path).name == "a.json" and Path(target).parent == folder
            if is_done or not is_it:
                move(path, target)
            if is_it:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_two(folder)
        assert files(folder) == {"dataset_dict.json": "second", "second.json": "second"}
    assert folder.stat().st_ino == number


@pytest.mark.parametrize("stays", [False, True])
def test_what_has_come_into_a_new_folder_meanwhile_is_kept(tmp_path, monkeypatch, stays):
    folder = tmp_path / "out"
    folder.mkdir()
    if stays:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    for text in ("first", "second"):
        refused = pytest.raises(MolaError, match="'a' has come into")
        with contextlib.nullcontext() if text == "first" else refused, new_folder("output", folder) as new:
            (new / "a").write_text(text)
    assert files(folder) == {"a": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(MolaError, match="`save_path` cannot be written"),
        complete_folder(tmp_path / "file" / "out", "save_path"),
    ):
        raise AssertionError("not reached")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(MolaError, match="`output` cannot be written: Permission denied"):
            check_new_folder("output", tmp_path / "a" / "b")
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_is_read_only_is_found_before_the_work(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "NamedTemporaryFile", full)
        with pytest.raises(MolaError, match="`output` cannot be written: Read-only file system"):
            check_new_folder("output", tmp_path / "a" / "b")
    assert check_new_folder("output", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list(tmp_path.iterdir())


def raise_in_block(folder, error):
    with complete_folder(folder) as (temporary, _):
        raise error(temporary)


@pytest.mark.parametrize(
    "error",
    [
        lambda folder: OSError(errno.ENOSPC, "No space left on device"),
        lambda folder: PermissionError(errno.EACCES, "Permission denied", str(folder / "a")),
        lambda folder: PermissionError(errno.EACCES, "Permission denied", "elsewhere", None, str(folder / "a")),
    ],
)
def test_error_of_writing_in_the_block_is_reported(tmp_path, error):
    with pytest.raises(MolaError, match=r"`output_dir` cannot be written: .* Choose another folder"):
        raise_in_block(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_error_of_reading_in_the_block_is_not_one_of_the_output(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), complete_folder(tmp_path / "out"):
        (tmp_path / "source.json").read_text()
    with pytest.raises(OSError, match="stale") as caught, complete_folder(tmp_path / "out"):
        raise OSError(errno.ESTALE, "stale file handle")
    assert not isinstance(caught.value, MolaError)
    assert list(tmp_path.iterdir()) == []


def test_result_stands_if_what_it_replaced_cannot_be_removed(tmp_path, monkeypatch, caplog):
    out, remove = tmp_path / "out", shutil.rmtree
    out.mkdir()
    (out / "a").write_text("old")

    def refuse(path, **options):
        if path.suffix == ".old":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with complete_folder(out) as (folder, _):
        (folder / "a").write_text("new")
    assert (out / "a").read_text() == "new"
    assert "is complete, but what it replaced could not be removed" in caplog.text

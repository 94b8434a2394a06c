import json
import os
import stat

import pytest

from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, atomic_write_text, check_writable


def test_text_is_written_into_new_folders_without_leftovers(tmp_path):
    target = tmp_path / "a" / "b" / "result.txt"
    assert atomic_write_text(target, "één\r\nline\n") == target
    assert target.read_bytes() == "één\r\nline\n".encode()
    assert os.listdir(target.parent) == ["result.txt"]


def test_text_replaces_an_existing_file(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("old and longer")
    atomic_write_text(target, "new")
    assert target.read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(step, tmp_path, monkeypatch):
    target = tmp_path / "result.txt"
    target.write_text("old")

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(target, "x" * 100_000)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_written_file_has_the_permissions_of_any_new_file(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    written = atomic_write_text(tmp_path / "written", "x")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path):
    path = atomic_write_text(tmp_path / f"{'長' * 83}.json", "a")
    assert path.read_text(encoding="utf-8") == "a"


def test_json_round_trip(tmp_path):
    data = {"a": [1, 2.5, None, True], "ü": "Ω"}
    path = atomic_write_json(tmp_path / "data.json", data)
    assert json.loads(path.read_text(encoding="utf-8")) == data
    assert path.read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_cannot_hold(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(tmp_path / "data.json", {"loss": value})
    assert os.listdir(tmp_path) == []


def test_check_writable_creates_the_folder_and_leaves_the_file_alone(tmp_path):
    target = tmp_path / "new" / "file.json"
    check_writable(target)
    assert target.parent.is_dir()
    assert not target.exists()
    target.write_text("content")
    check_writable(target)
    assert target.read_text() == "content"
    assert os.listdir(target.parent) == ["file.json"]


def test_check_writable_refuses_a_folder(tmp_path):
    with pytest.raises(MolaError, match="is a folder"):
        check_writable(tmp_path)


def test_check_writable_refuses_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MolaError, match="cannot be written"):
        check_writable(tmp_path / "file" / "result.json")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_check_writable_refuses_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(MolaError, match="cannot be written"):
            check_writable(tmp_path / "result.json")
    finally:
        tmp_path.chmod(0o700)


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(MolaError, match="is a device or a pipe"):
            atomic_write_text(place, "x")

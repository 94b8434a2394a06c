import errno
import json
import os
import stat

import pytest

from mola.errors import MolaError
from mola.files.atomic import (
    atomic_write_json,
    atomic_write_text,
    check_new_folder,
    check_output_folder,
    check_writable,
    write_folder,
    write_new_folder,
)


def test_text_is_written_into_new_folders_without_leftovers(tmp_path):
    target = tmp_path / "a" / "b" / "result.txt"
    for text in ("old and longer than the new text", "één\r\nline\n"):
        assert atomic_write_text(target, text) == target
        assert target.read_bytes() == text.encode()
    assert os.listdir(target.parent) == ["result.txt"]


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


def test_a_name_may_have_the_maximum_length_of_the_file_system(tmp_path):
    path = atomic_write_text(tmp_path / f"{'長' * 83}.json", "a")
    assert path.read_text(encoding="utf-8") == "a"


def test_json_round_trip(tmp_path):
    data = {"a": [1, 2.5, None, True], "ü": "Ω"}
    path = atomic_write_json(tmp_path / "data.json", data)
    assert json.loads(path.read_text(encoding="utf-8")) == data
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_json_refuses_what_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(tmp_path / "data.json", {"loss": float("nan")})
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


def test_check_writable_refuses_a_folder_and_a_parent_that_is_a_file(tmp_path):
    with pytest.raises(MolaError, match="is a folder or a device"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MolaError, match="cannot be written"):
        check_writable(tmp_path / "file" / "result.json")


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(MolaError, match="is a folder or a device"):
            atomic_write_text(place, "x")


def fail_in_block(folder, error):
    with write_folder(folder) as new:
        (new / "a").write_text("x")
        raise error


def test_folder_appears_only_without_an_error(tmp_path):
    with pytest.raises(KeyError):
        fail_in_block(tmp_path / "out", KeyError())
    assert list(tmp_path.iterdir()) == []
    with write_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


@pytest.mark.parametrize("failing", [None, 1, 2])
def test_folder_replaces_another_one_completely_or_not_at_all(tmp_path, monkeypatch, failing):
    out, rename, calls = tmp_path / "out", os.replace, []
    out.mkdir()
    (out / "old").write_text("old")

    def replace(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise KeyboardInterrupt
        rename(source, target)

    def write():
        with write_folder(out) as folder:
            (folder / "new").write_text("new")

    monkeypatch.setattr(os, "replace", replace)
    if failing:
        with pytest.raises(KeyboardInterrupt):
            write()
    else:
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old" if failing else "new"]


def test_a_full_disk_is_reported_with_the_option(tmp_path):
    with pytest.raises(MolaError, match=r"`output_dir` cannot be written: No space left on device"):
        fail_in_block(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(FileNotFoundError, match="source"):
        fail_in_block(tmp_path / "out", FileNotFoundError("source"))
    assert list(tmp_path.iterdir()) == []


def write_while_another_program_does(folder):
    with write_new_folder("output", folder) as new:
        (new / "a").write_text("second")
        folder.mkdir()
        (folder / "a").write_text("first")


def test_a_new_folder_keeps_what_another_program_has_written_meanwhile(tmp_path):
    with pytest.raises(MolaError, match="another program has written"):
        write_while_another_program_does(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_with_files_are_refused_unless_they_are_replaced(tmp_path):
    def check(overwrite, is_own):
        check_output_folder(
            tmp_path,
            option="output_dir",
            overwrite=overwrite,
            overwrite_option="overwrite",
            writer="`mola prepare`",
            is_own=lambda folder: is_own,
        )

    assert check_new_folder("output", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    check(False, False)
    (tmp_path / "file").write_text("")
    with pytest.raises(MolaError, match="new or empty"):
        check_new_folder("output", tmp_path)
    with pytest.raises(MolaError, match="must be a folder"):
        check_new_folder("output", tmp_path / "file")
    with pytest.raises(MolaError, match="`output_dir` must be empty"):
        check(False, True)
    with pytest.raises(MolaError, match="only if `mola prepare` wrote it"):
        check(True, False)
    check(True, True)


def test_a_mount_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(MolaError, match="is a mount"):
        check_new_folder("output", tmp_path)

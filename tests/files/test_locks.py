"""Locks, also where there are none."""

import errno

import pytest
from filelock import FileLock

from mola.files.locks import held


def test_a_lock_is_one_holders_alone(tmp_path):
    path = tmp_path / "lock"
    with held(path, waits=False) as first:
        assert first
        with held(path, waits=False) as second:
            assert not second
    with held(path, waits=True) as again:
        assert again


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError()], ids=repr)
def test_a_file_system_without_locks_is_said(error, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    with held(tmp_path / "lock", waits=True) as is_mine:
        assert is_mine
    assert f"The file system of {tmp_path} has no locks" in caplog.text


def test_another_error_is_not_hidden(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EACCES, "not allowed")

    monkeypatch.setattr(FileLock, "acquire", fail)
    with pytest.raises(OSError, match="not allowed"), held(tmp_path / "lock", waits=False):
        pass

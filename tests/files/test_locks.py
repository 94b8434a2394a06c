"""Locks, also where there are none."""

import errno
import sys

import pytest
from filelock import FileLock

from mola.files import locks
from mola.files.locks import hold_lock


def test_a_lock_is_one_holders_alone(tmp_path):
    path = tmp_path / "lock"
    with hold_lock(path, waits=False) as first:
        assert first
        with hold_lock(path, waits=False) as second:
            assert not second
    with hold_lock(path, waits=True) as again:
        assert again


@pytest.mark.skipif(sys.platform == "win32", reason="these are the locks of Unix")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(number, tmp_path, monkeypatch, caplog):
    import fcntl

    def fail(*args):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", fail)
    locks._warn_once.cache_clear()  # a test's folder may have the name of one that is gone
    for _ in range(2):
        with hold_lock(tmp_path / "lock", waits=True) as is_mine:
            assert is_mine
            # No file stands for a lock, for killed processes leave it.
            with hold_lock(tmp_path / "lock", waits=False) as is_mine:
                assert is_mine
    assert f"The file system of {tmp_path} has no locks" in caplog.text


def test_another_error_is_not_hidden(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EACCES, "not allowed")

    monkeypatch.setattr(FileLock, "acquire", fail)
    with pytest.raises(OSError, match="not allowed"), hold_lock(tmp_path / "lock", waits=False):
        pass

import pytest

from mola.tuner.kernels import dispatch


@pytest.fixture
def force(monkeypatch):
    """A function that sets `MOLA_KERNEL`; forgotten after the test."""

    def set_name(name):
        monkeypatch.setenv("MOLA_KERNEL", name)
        dispatch._read_choice.cache_clear()

    yield set_name
    monkeypatch.undo()
    dispatch._read_choice.cache_clear()

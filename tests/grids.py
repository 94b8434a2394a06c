"""Marks rows of a test's grid that run in `make test-all` only."""

import pytest


def slow(*rows):
    """Rows for `parametrize`, a tuple or a single value each, for `make test-all` only."""
    return [pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow) for row in rows]

"""Rows of a test's grid of which a few tell most: the others run in `make test-all`."""

import pytest


def slow(*rows):
    """Rows for `parametrize`, a tuple or a single value each, for `make test-all` only."""
    return [pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow) for row in rows]

"""Intervals of a run's `routing.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

_Modules = Sequence[Mapping[str, Any]]  # the records of an interval, one per module


def is_short(last: _Modules, before: _Modules) -> bool:
    """Whether a run ended so soon after the interval before that its last one says little: below half the tokens.

    False where a record lacks `num_tokens`, as those of earlier versions.
    """
    if not all("num_tokens" in record for record in (*last, *before)):
        return False
    few, many = (sum(record["num_tokens"] for record in modules) for modules in (last, before))
    return bool(2 * few < many)

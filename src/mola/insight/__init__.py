"""What routers decide and how experts are used, recorded in training and measured on data."""

from collections.abc import Mapping, Sequence
from typing import Any

ROUTING_FILE = "routing.jsonl"  # in a run folder: the use of experts during training


def is_short_interval(last: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last interval in a `routing.jsonl` has less than half the tokens of the interval before.

    A short interval says little: the run ended soon after the interval began. Both arguments are the records of an
    interval, one per module. False if a record lacks `num_tokens`, like those of earlier versions.
    """
    if not all("num_tokens" in record for record in (*last, *before)):
        return False
    tokens_last, tokens_before = (sum(record["num_tokens"] for record in records) for records in (last, before))
    return bool(2 * tokens_last < tokens_before)

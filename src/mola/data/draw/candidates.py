"""Rows of a data source that samples can be drawn from, of which a few dozen bytes are kept each."""

from array import array
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mola.data.examples import check_columns
from mola.data.hashing import hash_example, hash_text
from mola.data.source import Source
from mola.data.tasks import Task

_SHOWN_GROUPS = 20
_REASONS = {
    "filtered": "by the task's filters",
    "blank": "without text",
    "duplicates": "with a text that an earlier row has",
    "repeated_ids": "with an id that an earlier row has",
}


@dataclass(frozen=True)
class Candidates:
    """Rows that can be drawn, and why others cannot."""

    numbers: NDArray[np.int64]  # positions in the source
    texts: NDArray[np.uint64]  # hash of instruction, input and output of each
    groups: NDArray[np.int64]  # number of the group of each, in the order in which groups first occur
    group_names: list[str]  # names of the groups, or nothing if there are many
    # rows that are `filtered`, `blank`, `duplicates` of an earlier text, or have `repeated_ids`
    left_out: dict[str, int]

    @property
    def rows(self) -> int:
        """All rows of the source."""
        return len(self.numbers) + sum(self.left_out.values())

    def reasons(self) -> str:
        """`left_out` in words."""
        return ", ".join(f"{count} {_REASONS[name]}" for name, count in self.left_out.items())


def find_candidates(source: Source, task: Task, columns: Collection[str], unique_ids: bool) -> Candidates:
    """First pass: rows that the task keeps, that have their text, and whose text no earlier row has.

    `columns` is what is needed of a row; `unique_ids` also leaves out rows with an `id` that an earlier row has.
    """
    numbers, texts, groups, ids = (array(kind) for kind in "qQQQ")
    names: dict[int, str] = {}
    filtered = blank = 0
    for number, row in enumerate(source.rows(columns)):
        if not task.keeps(row):
            filtered += 1
            continue
        check_columns(row, number, task, source.path, strata=task.strata, columns=lambda: next(source.rows()))
        if task.blank_column(row) is not None:
            blank += 1
            continue
        example = task.example(row, number, source.split)
        group = task.strata.resolve(row, example["id"]) if task.strata else ""
        numbers.append(number)
        texts.append(hash_example(example))
        groups.append(hash_text(group))
        ids.append(hash_text(example["id"]))
        if len(names) <= _SHOWN_GROUPS:
            names.setdefault(groups[-1], group)
    is_first = _is_first(np.array(texts, dtype=np.uint64))
    duplicates = len(numbers) - int(is_first.sum())
    if unique_ids:
        kept = np.flatnonzero(is_first)
        is_first[kept] = _is_first(np.array(ids, dtype=np.uint64)[kept])
    hashes, codes = _in_order(np.array(groups, dtype=np.uint64)[is_first])
    return Candidates(
        numbers=np.array(numbers, dtype=np.int64)[is_first],
        texts=np.array(texts, dtype=np.uint64)[is_first],
        groups=codes,
        group_names=[names[each] for each in hashes.tolist()] if len(names) <= _SHOWN_GROUPS else [],
        left_out={"filtered": filtered, "blank": blank, "duplicates": duplicates}
        | ({"repeated_ids": len(numbers) - duplicates - int(is_first.sum())} if unique_ids else {}),
    )


def _is_first(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether no earlier value is the same."""
    result = np.zeros(len(values), dtype=bool)
    result[np.unique(values, return_index=True)[1]] = True
    return result


def _in_order(values: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Different values in the order they first occur, and for every value its place there."""
    different, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return different[order], places[inverse]

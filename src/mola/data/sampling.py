"""`mola prepare --num_samples`: splits drawn at random from one source, which need not fit into memory.

The source is read twice. The first pass keeps a few dozen bytes of every row; the second one fetches the drawn rows.
"""

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mola.data.examples import count_shared, examples_of_rows, hash_example, hash_instruction, hash_text
from mola.data.read import Source, row_name, source_splits
from mola.data.tasks import Task
from mola.errors import MolaError

HELD_OUT_SIZE = 1000  # default number of validation and of test rows
_REASONS = {
    "filtered": "by the task's filters",
    "blank": "without text",
    "duplicates": "with a text that an earlier row has",
    "repeated_ids": "with an id that an earlier row has",
}
_Build = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Candidates:
    """Rows that can be drawn, and how many cannot, by reason."""

    row_numbers: NDArray[np.int64]  # positions in the source
    texts: NDArray[np.uint64]  # hash of instruction, input and output of each row
    groups: NDArray[np.int64]  # group number of each row; groups are numbered in the order in which they first occur
    left_out: dict[str, int]  # reason (see `_REASONS`) -> number of rows

    @property
    def num_rows(self) -> int:
        """All rows of the source."""
        return len(self.row_numbers) + sum(self.left_out.values())

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.groups.max(initial=-1)) + 1

    def reasons(self) -> str:
        """The numbers of rows left out, by reason, as text."""
        return ", ".join(f"{count} {_REASONS[name]}" for name, count in self.left_out.items())


@dataclass(frozen=True)
class Drawn:
    """Drawn rows and what they were drawn from."""

    splits: dict[str, list[dict[str, Any]]]
    candidates: Candidates
    shared_instructions: int  # instructions, with their input, that occur in more than one split

    def summary(self) -> str:
        """Lines that say what was drawn from what."""
        source = self.candidates
        lines = [
            f"source: {source.num_rows} rows, left out: {source.reasons()}; {len(source.row_numbers)} to draw from"
        ]
        if source.num_groups > 1:
            lines.append(f"{source.num_groups} groups, each keeps its share of the rows")
        lines += [f"{split}: {len(rows)} rows" for split, rows in self.splits.items()]
        if self.shared_instructions:
            lines.append(f"warning: {self.shared_instructions} instructions occur in more than one split")
        return "\n".join(lines)


def drawn_sizes(num_samples: int, num_validation: int | None, num_test: int | None) -> dict[str, int]:
    """Split -> number of rows to draw; None means 1000.

    Raises:
        MolaError: `num_samples` is below 1, or one of the others is below 0.
    """
    given = {"num_samples": num_samples, "num_validation": num_validation, "num_test": num_test}
    sizes = {name: HELD_OUT_SIZE if size is None else size for name, size in given.items()}
    for name, size in sizes.items():
        least = 1 if name == "num_samples" else 0
        if size < least:
            raise MolaError(f"`{name}` must be at least {least}: got {size}. Choose another number.")
    return dict(zip(("train", "validation", "test"), sizes.values(), strict=True))


def single_source(data: str, *, may_take_all: bool = True) -> Source:
    """The table that samples are drawn from: a file, the split `train`, or the only split.

    Args:
        data: as in `source_splits`.
        may_take_all: whether the command can also use the splits as they are, without `num_samples`; for the message.

    Raises:
        MolaError: there are several files, or several splits without a `train`.
    """
    splits = source_splits(data)
    if "=" in data and len(splits) > 1 and all(source.split is None for source in splits.values()):
        otherwise = ", or leave `num_samples` out to use the splits as they are" if may_take_all else ""
        raise MolaError(
            f"`data` must be a single source to draw samples from: got the files {data!r}. Name one of them{otherwise}."
        )
    if len(splits) > 1 and "train" not in splits:
        raise MolaError(
            f"`data` must have a split `train` to draw samples from: `{data}` has {', '.join(splits)}. Pass a single "
            "file, or the folder of one split."
        )
    return splits.get("train") or next(iter(splits.values()))


def draw_splits(
    source: Source,
    task: Task,
    sizes: Mapping[str, int],
    seed: int,
    build: _Build,
    *,
    columns: Collection[str] | None = None,
    unique_ids: bool = True,
) -> Drawn:
    """Draw the rows of every split: without replacement, without equal texts, every group in its share.

    Args:
        source: where rows come from; it is read twice.
        task: turns a row into an example, and says which rows count and which groups they form.
        sizes: split -> number of rows to draw.
        seed: the same source, sizes and seed give the same rows in the same order.
        build: makes the row of the result from a source row and its example.
        columns: columns of a source row that `build` needs in addition to those that the task reads; None for all.
        unique_ids: leave out rows with an `id` that an earlier row has.

    Raises:
        MolaError: the source has too few rows, a row does not fit the task, or the source changes while it is read.
    """
    needed = {*task.columns, *task.filters, "id"} | ({task.strata.column} if task.strata else set())
    candidates = _find_candidates(source, task, needed, unique_ids)
    if sum(sizes.values()) > len(candidates.row_numbers):
        parts = " + ".join(f"{size} for {split}" for split, size in sizes.items())
        raise MolaError(
            f"`num_samples`, `num_validation` and `num_test` must be at most {len(candidates.row_numbers)} rows "
            f"together: got {parts} = {sum(sizes.values())}. `{source.path}` has {candidates.num_rows} rows, left out: "
            f"{candidates.reasons()}. Lower the numbers, or choose a larger source."
        )
    drawn = dict(zip(sizes, draw(candidates.groups, list(sizes.values()), seed), strict=True))
    positions = np.sort(np.concatenate(list(drawn.values())))
    columns = None if columns is None else needed | {*columns}
    rows, instructions = _fetch(source, task, candidates, positions, columns, build)
    indices = {split: np.searchsorted(positions, chosen) for split, chosen in drawn.items()}  # into `rows`
    return Drawn(
        splits={split: [rows[index] for index in chosen.tolist()] for split, chosen in indices.items()},
        candidates=candidates,
        shared_instructions=count_shared([instructions[chosen] for chosen in indices.values()]),
    )


def _find_candidates(source: Source, task: Task, columns: Collection[str], unique_ids: bool) -> Candidates:
    """First pass: find rows that pass the task's filters, are not blank, and have a text that no earlier row has."""
    numbers, texts, groups, ids = (array(kind) for kind in "qQQQ")
    filtered = blank = 0
    for number, row in enumerate(source.rows(columns)):
        if not task.keeps(row):
            filtered += 1
            continue
        if task.missing_columns(row):
            row = next(islice(source.rows(), number, None))  # with all columns, which the error names
            examples_of_rows([(number, row)], task, source.split, source.path)
        if task.blank_column(row) is not None:
            blank += 1
            continue
        example = task.example(row, number, source.split)
        group = task.strata.resolve(row, example["id"]) if task.strata else ""
        numbers.append(number)
        texts.append(hash_example(example))
        groups.append(hash_text(group))
        ids.append(hash_text(example["id"]))
    is_first = _is_first(np.array(texts, dtype=np.uint64))
    left_out = {"filtered": filtered, "blank": blank, "duplicates": len(numbers) - int(is_first.sum())}
    if unique_ids:
        kept = np.flatnonzero(is_first)
        is_first[kept] = _is_first(np.array(ids, dtype=np.uint64)[kept])
        left_out["repeated_ids"] = len(kept) - int(is_first.sum())
    _, first, codes = np.unique(np.array(groups, np.uint64)[is_first], return_index=True, return_inverse=True)
    return Candidates(
        row_numbers=np.array(numbers, dtype=np.int64)[is_first],
        texts=np.array(texts, dtype=np.uint64)[is_first],
        groups=first.argsort().argsort()[codes],  # the rank of a group's first row is the number of the group
        left_out=left_out,
    )


def _is_first(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """For each value, whether no earlier value equals it."""
    result = np.zeros(len(values), dtype=bool)
    result[np.unique(values, return_index=True)[1]] = True
    return result


def draw(groups: NDArray[np.int64], sizes: Sequence[int], seed: int) -> list[NDArray[np.int64]]:
    """Rows of every split, at random, each group in its share.

    Args:
        groups: group number of every row, from 0.
        sizes: rows of every split, together at most the number of rows.
        seed: the same arguments give the same rows, on every machine.

    Returns:
        Row numbers by split, shuffled; no row is drawn twice.
    """
    counts = np.bincount(groups, minlength=1)
    # All groups of a single row are merged into one group: the rounded share of a single row would be arbitrary.
    is_single = counts == 1
    if is_single.any():
        merged = np.where(is_single, 0, np.cumsum(~is_single))
        groups = merged[groups]
        counts = np.bincount(groups)
    # Raw draws: NumPy promises that their stream never changes.
    generator = np.random.PCG64(seed)
    by_group = np.lexsort((generator.random_raw(len(groups)), groups))
    chosen: list[list[NDArray[np.int64]]] = [[] for _ in sizes]
    for start, shares in zip((counts.cumsum() - counts).tolist(), allocate(counts, sizes), strict=True):
        for split, share in enumerate(shares):
            chosen[split].append(by_group[start : start + share])
            start += share
    rows = [np.concatenate(parts) for parts in chosen]
    return [part[np.argsort(generator.random_raw(len(part)), kind="stable")] for part in rows]


def allocate(counts: Sequence[int] | NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.int64]:
    """Rows that each group gives to each split, proportional to the rows of the group (largest remainders).

    With ``N`` rows in all, the share of a group of ``c`` rows in a split of ``n`` rows is ``c * n / N``, rounded down.
    The rows that a split still needs come from the groups with the largest remainders that have rows left. So every
    split gets exactly its number of rows, and no group gives more rows than it has.

    Args:
        counts: rows of every group.
        sizes: rows of every split, together at most the sum of `counts`.

    Returns:
        int64, shape ``(groups, splits)``.
    """
    available = np.array(counts, dtype=np.int64)
    total = max(int(available.sum()), 1)
    floors, remainders = np.divmod(available[:, None] * np.array(sizes, dtype=np.int64), total)
    table = floors.copy()
    for split, size in enumerate(sizes):
        while (needed := size - int(table[:, split].sum())) > 0:
            # Of groups with equal remainders, the group with the fewest extra rows so far comes first.
            order = np.lexsort(((table - floors).sum(axis=1), -remainders[:, split]))
            has_rows = (available > table.sum(axis=1))[order]
            table[order[has_rows][:needed], split] += 1
    return table


def _fetch(
    source: Source,
    task: Task,
    candidates: Candidates,
    positions: NDArray[np.int64],
    columns: Collection[str] | None,
    build: _Build,
) -> tuple[list[dict[str, Any]], NDArray[np.uint64]]:
    """Second pass: build the rows of the candidates at ascending positions, and hash their instructions."""
    texts = dict(zip(candidates.row_numbers[positions].tolist(), candidates.texts[positions].tolist(), strict=True))
    rows: list[dict[str, Any]] = []
    instructions = array("Q")
    for number, row in enumerate(source.rows(columns)):
        if len(rows) == len(texts):
            break
        if number not in texts:
            continue
        example = {} if task.missing_columns(row) else task.example(row, number, source.split)
        if not example or hash_example(example) != texts[number]:
            break
        rows.append(build(row, example))
        instructions.append(hash_instruction(example))
    if len(rows) < len(texts):
        raise MolaError(
            f"`data` must not change while it is read: {row_name([*texts][len(rows)], source.path)} has changed since "
            "the first pass. Run the command again."
        )
    return rows, np.array(instructions, dtype=np.uint64)

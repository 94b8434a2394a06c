"""A random part of a data source as splits: without replacement, without equal texts, in two passes.

The first pass looks at what the task needs of every row, the second one fetches the rows that were drawn. So the
source may be larger than memory.
"""

from array import array
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mola.data.draw.candidates import Candidates, find_candidates
from mola.data.draw.sampling import draw
from mola.data.hashing import count_shared, hash_example, hash_instruction
from mola.data.source import Source
from mola.data.spool import Spool
from mola.data.tasks import Task
from mola.errors import MolaError

_Build = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Subset:
    """What was drawn."""

    numbers: dict[str, NDArray[np.int64]]  # rows of the spool by split, in their order
    candidates: Candidates  # rows that were drawn from, and how many others there are
    # group -> candidates and rows of every split; None if there are many groups
    groups: dict[str, dict[str, int]] | None
    num_groups: int  # how many groups there are
    shared_instructions: int  # instructions (with their input) that occur in more than one split

    def summary(self) -> str:
        """Lines that say what was drawn from what."""
        source = self.candidates
        lines = [f"source: {source.rows} rows, left out: {source.reasons()}; {len(source.numbers)} to draw from"]
        if self.groups is None:
            lines.append(f"{self.num_groups} groups, each in its share")
        elif self.num_groups > 1:
            for name, counts in self.groups.items():
                shares = ", ".join(f"{count} {split}" for split, count in counts.items() if split != "candidates")
                lines.append(f"group {name}: {counts['candidates']} rows, of these {shares}")
        lines += [f"{split}: {len(rows)} rows" for split, rows in self.numbers.items()]
        if self.shared_instructions:
            lines.append(f"warning: {self.shared_instructions} instructions occur in more than one split")
        return "\n".join(lines)


def draw_subset(
    source: Source,
    task: Task,
    sizes: Mapping[str, int],
    seed: int,
    spool: Spool,
    build: _Build,
    *,
    columns: Collection[str] | None = None,
    unique_ids: bool = True,
) -> Subset:
    """Draw rows for every split and put them into the spool.

    Args:
        source: where rows come from; it is read twice.
        task: turns a row into an example, says which rows count and which groups they form.
        sizes: rows by split.
        seed: the same source, sizes and seed give the same rows in the same order.
        spool: receives what `build` returns.
        build: makes the row to be written of a source row and its example.
        columns: what `build` needs of the source row, besides what the task needs; None for everything.
        unique_ids: leave out rows with an `id` that an earlier row has.

    Returns:
        The rows of every split in the spool, shuffled, and counts.

    Raises:
        MolaError: the source has too few rows, a row does not fit the task, or the source changes between the passes.
    """
    if seed < 0:
        raise MolaError(f"`seed` must be at least 0: got {seed}. Choose another one.")
    needed = {*task.columns, *task.filters, "id"} | ({task.strata.column} if task.strata else set())
    candidates = find_candidates(source, task, needed, unique_ids)
    _check_sizes(sizes, candidates, source)
    drawn = draw(candidates.groups, list(sizes.values()), seed)
    positions = np.concatenate(drawn)
    order = np.argsort(candidates.numbers[positions])
    heads = _fetch(
        source,
        task,
        candidates.numbers[positions[order]],
        candidates.texts[positions[order]],
        None if columns is None else needed | set(columns),
        lambda row, example: spool.add(build(row, example)),
    )
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    numbers = dict(zip(sizes, np.split(places, np.cumsum([len(part) for part in drawn])[:-1]), strict=True))
    return Subset(
        numbers=numbers,
        candidates=candidates,
        groups=_group_counts(candidates, dict(zip(sizes, drawn, strict=True))),
        num_groups=int(candidates.groups.max(initial=-1)) + 1,
        shared_instructions=count_shared([heads[part] for part in numbers.values()]),
    )


def _fetch(
    source: Source,
    task: Task,
    numbers: NDArray[np.int64],
    texts: NDArray[np.uint64],
    columns: Collection[str] | None,
    take: Callable[[Mapping[str, Any], Mapping[str, Any]], None],
) -> NDArray[np.uint64]:
    """Second pass: hand over the rows of these ascending numbers; hashes of their instructions, 0 for none."""
    heads = array("Q")
    wanted = zip(numbers.tolist(), texts.tolist(), strict=True)
    number, text = next(wanted, (-1, 0))
    for index, row in enumerate(source.rows(columns)):
        if number < 0:
            break
        if index < number:
            continue
        example = task.example(row, index, source.split) if not task.missing_columns(row) else {}
        if not example or hash_example(example) != text:
            break
        take(row, example)
        heads.append(hash_instruction(example))
        number, text = next(wanted, (-1, 0))
    if number >= 0:
        raise MolaError(
            f"`data` must not change while it is read: row {number} of `{source.path}` is another one than before. "
            "Run the command again."
        )
    return np.array(heads, dtype=np.uint64)


def _check_sizes(sizes: Mapping[str, int], candidates: Candidates, source: Source) -> None:
    wanted, there = sum(sizes.values()), len(candidates.numbers)
    if wanted <= there:
        return
    parts = " + ".join(f"{size} for {split}" for split, size in sizes.items())
    raise MolaError(
        f"`num_samples`, `num_validation` and `num_test` must be at most {there} rows together: got {parts} = "
        f"{wanted}. `{source.path}` has {candidates.rows} rows, left out: {candidates.reasons()}. "
        "Lower the numbers, or choose a larger source."
    )


def _group_counts(candidates: Candidates, drawn: Mapping[str, NDArray[np.int64]]) -> dict[str, dict[str, int]] | None:
    if len(candidates.groups) and not candidates.group_names:
        return None
    counts: dict[str, dict[str, int]] = {}
    for group, name in enumerate(candidates.group_names):
        counts[name] = {"candidates": int((candidates.groups == group).sum())}
        counts[name] |= {split: int((candidates.groups[rows] == group).sum()) for split, rows in drawn.items()}
    return counts

"""Which rows go to which split: without replacement, every group in its share.

`allocate` says how many rows each group gives to each split, `draw` says which. Both see numbers only.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Cell = tuple[int, int]


def allocate(counts: Sequence[int], sizes: Sequence[int]) -> NDArray[np.int64]:
    """Rows that each group gives to each split, proportional to the groups.

    With ``N`` rows in all, the exact share of a group of ``c`` rows in a split of ``n`` rows is ``c * n / N``.
    It is rounded down or up such that every split gets exactly its rows and no group gives more than it has:
    up where the remainders are largest, unless small groups would have to give too much.

    Args:
        counts: rows of every group.
        sizes: rows of every split, together at most the sum of `counts`.

    Returns:
        int64, shape ``(groups, splits)``.

    Raises:
        ValueError: more rows are wanted than there are.
    """
    total, wanted = sum(counts), sum(sizes)
    if wanted > total:
        raise ValueError(f"{wanted} rows are wanted of {total}.")
    # The last column is what stays unused: with it every row of the table sums up to the group's count.
    columns = np.array([*sizes, total - wanted], dtype=np.int64)
    shares, remainders = np.divmod(np.array(counts, dtype=np.int64)[:, None] * columns[None, :], max(total, 1))
    table = shares[:, :-1].copy()
    for split, size in enumerate(sizes):
        # Of equal remainders, that of the group which has given fewest to make up for rounding.
        largest = np.lexsort(((table - shares[:, :-1]).sum(axis=1), -remainders[:, split]))
        table[largest[: size - table[:, split].sum()], split] += 1
    if (table.sum(axis=1) <= np.array(counts)).all():
        return table
    return _round_together(shares, remainders, total)[:, :-1]


def _round_together(table: NDArray[np.int64], remainders: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Controlled rounding of a table of which all rows and columns sum up to integers: the sums stay.

    Remainders are moved around a cycle of cells until one of these is whole; without a cycle all cells are.
    They are what rounding down took away, in parts of `total`, and are used up; `table` comes back with ones added.
    """
    open_rows: list[int] = []
    for row in np.flatnonzero(remainders.any(axis=1)).tolist():
        open_rows.append(row)
        while cycle := _find_cycle(remainders[open_rows] > 0):
            _move(remainders, [(open_rows[place], column) for place, column in cycle], table, total)
            open_rows = [each for each in open_rows if remainders[each].any()]
    return table


def _find_cycle(is_open: NDArray[np.bool_]) -> list[_Cell]:
    """Open cells of which each shares its row, then its column, in turn, with the next; empty if there are none."""

    def walk(path: list[tuple[str, int]]) -> list[tuple[str, int]]:
        kind, index = path[-1]
        line = is_open[index] if kind == "row" else is_open[:, index]
        for other in np.flatnonzero(line).tolist():
            node = ("column" if kind == "row" else "row", other)
            if node in path[-2:-1]:
                continue
            if node in path:
                return path[path.index(node) :]
            if found := walk([*path, node]):
                return found
        return []

    # A new cycle goes through the row that was added last.
    nodes = walk([("row", len(is_open) - 1)]) if len(is_open) else []
    pairs = zip(nodes, [*nodes[1:], *nodes[:1]], strict=True)
    return [(a[1], b[1]) if a[0] == "row" else (b[1], a[1]) for a, b in pairs]


def _move(remainders: NDArray[np.int64], cycle: list[_Cell], table: NDArray[np.int64], total: int) -> None:
    """Raise every other cell of the cycle and lower those between, until one of them is whole."""
    raised, lowered = cycle[::2], cycle[1::2]
    if sum(remainders[cell] for cell in raised) < sum(remainders[cell] for cell in lowered):
        raised, lowered = lowered, raised
    step = min(min(total - remainders[cell] for cell in raised), min(remainders[cell] for cell in lowered))
    for cell in raised:
        remainders[cell] += step
        if remainders[cell] == total:
            remainders[cell] = 0
            table[cell] += 1
    for cell in lowered:
        remainders[cell] -= step


def draw(groups: NDArray[np.int64], sizes: Sequence[int], seed: int) -> list[NDArray[np.int64]]:
    """Rows of every split, at random, each group in its share.

    Args:
        groups: number of the group of every row, from 0.
        sizes: rows of every split, together at most the number of rows.
        seed: the same arguments give the same rows, on every machine.

    Returns:
        Row numbers by split, shuffled; no row is in two splits, or in one twice.
    """
    counts = np.bincount(groups, minlength=1)
    # Of a single row, any number is its share rounded down or up: these groups can be drawn from as one.
    is_single = counts == 1
    if is_single.any():
        merged = np.where(is_single, 0, np.cumsum(~is_single))
        groups = merged[groups]
        counts = np.bincount(groups)
    # Raw draws: NumPy promises that their stream never changes.
    generator = np.random.PCG64(seed)
    by_group = np.lexsort((generator.random_raw(len(groups)), groups))
    chosen: list[list[NDArray[np.int64]]] = [[] for _ in sizes]
    for start, shares in zip((counts.cumsum() - counts).tolist(), allocate(counts.tolist(), sizes), strict=True):
        for split, share in enumerate(shares):
            chosen[split].append(by_group[start : start + share])
            start += share
    rows = [np.concatenate(parts) for parts in chosen]
    return [part[np.argsort(generator.random_raw(len(part)), kind="stable")] for part in rows]

import os
import subprocess
import sys

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mola.data.sampling import allocate, draw


@st.composite
def counts_and_sizes(draw_value):
    counts = draw_value(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    cuts = sorted(draw_value(st.lists(st.integers(0, sum(counts)), min_size=3, max_size=3)))
    use_all = draw_value(st.booleans())
    return counts, [cuts[0], cuts[1] - cuts[0], (sum(counts) if use_all else cuts[2]) - cuts[1]]


@given(counts_and_sizes())
@example(([1, 1, 1], [1, 1, 1]))
@example(([1, 2], [1, 2, 0]))
@settings(max_examples=100)
def test_sizes_are_exact_and_no_group_gives_more_than_it_has(case):
    counts, sizes = case
    table = allocate(counts, sizes)
    floors = np.outer(counts, sizes) // sum(counts)
    assert table.sum(axis=0).tolist() == sizes
    assert (table.sum(axis=1) <= counts).all()
    assert (table >= floors).all()
    if sum(sizes) <= sum(counts) // 2 and min(counts) > 2 * len(sizes):  # every group has rows left
        assert (table - np.outer(counts, sizes) / sum(counts) < 1).all()


@given(counts_and_sizes())
def test_one_split_gets_the_largest_remainders(case):
    counts, sizes = case
    size, total = sizes[0], sum(counts)
    expected = [count * size // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda group: (-(counts[group] * size % total), group))
    for group in by_remainder[: size - sum(expected)]:
        expected[group] += 1
    assert allocate(counts, [size])[:, 0].tolist() == expected


@given(counts_and_sizes(), st.integers(0, 2**32))
@settings(max_examples=100)
def test_draw_is_without_replacement_and_in_shares(case, seed):
    counts, sizes = case
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    drawn = draw(groups, sizes, seed)
    assert [len(rows) for rows in drawn] == sizes
    together = np.concatenate(drawn)
    assert len(set(together.tolist())) == len(together), "a row was drawn twice"
    assert all(0 <= row < len(groups) for row in together)
    for rows, size in zip(drawn, sizes, strict=True):
        for group, count in enumerate(counts):
            assert (groups[rows] == group).sum() >= (count * size // len(groups) if count > 1 else 0)
    assert all((a == b).all() for a, b in zip(drawn, draw(groups, sizes, seed), strict=True))


def test_other_seeds_give_other_rows_in_another_order():
    groups = np.zeros(1000, dtype=np.int64)
    first, second = draw(groups, [100], 0)[0], draw(groups, [100], 1)[0]
    assert set(first.tolist()) != set(second.tolist())
    assert (np.diff(first) < 0).any(), "the order of the source"
    assert draw(groups, [1000], 0)[0].tolist() != draw(groups, [1000], 1)[0].tolist()


def test_rows_are_these_on_every_machine_and_with_every_version():
    assert [rows.tolist() for rows in draw(np.array([0, 1, 0, 1, 0, 0, 2]), [3, 1], 10)] == [
        [4, 5, 3],
        [2],
    ]


def test_every_row_is_equally_likely():
    # 400 draws of 3 of 12 rows: each row is expected 100 times, with a standard deviation of 9.
    groups = np.repeat([0, 1], [8, 4])
    times = np.bincount(np.concatenate([draw(groups, [3], seed)[0] for seed in range(400)]), minlength=12)
    assert times.sum() == 1200
    assert (np.abs(times - 100) < 45).all()


def test_hash_seed_of_python_changes_nothing():
    code = (
        "import numpy as np; from mola.data.sampling import draw; from mola.data.examples import hash_text;"
        "print([r.tolist() for r in draw(np.arange(40) % 3, [9, 4], 7)], hash_text('a'))"
    )
    # Called like the command: this way torch is not imported, which takes long.
    program = f"import sys; sys.argv[0] = 'mola'; {code}"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    from mola.data.examples import hash_text

    here = [rows.tolist() for rows in draw(np.arange(40) % 3, [9, 4], 7)]
    assert process.stdout.strip() == f"{here} {hash_text('a')}"

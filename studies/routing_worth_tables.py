"""The tables of `studies.routing_worth`, from its record alone: of every recipe, and of a task's differences."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

import numpy as np

from mola.evaluation.differences import paired_difference
from mola.reporting.formatting import computers, duration, markdown_table
from mola.reporting.formatting import points as in_points
from mola.studies.comparison.marks import as_numbers
from mola.studies.comparison.notes import few_seeds
from mola.studies.comparison.options import Key
from mola.studies.comparison.tables import interval_cell

_COLUMNS = ("task", "recipe", "seeds", "mixture", "LoRA", "LoRA less mixture", "its 95 %", "verdict")
_COLUMNS += ("least", "most", "KL")
_QUANTILES = {"least": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "most": 1.0}
NOTE = (
    "Accuracy in per cent, LoRA less mixture in points, on the same questions; its interval is for other seeds and "
    "other questions (of one seed for other questions), the verdict allows for all rows of its task. Least and "
    "most: of one seed. KL(mixture || LoRA): nats per token of held-out training answers."
)


def note_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the tables mean."""
    seeds = Counter(key_of(entry)[:2] for entry in entries)
    return " ".join([NOTE, *few_seeds(seeds.values())])


def key_of(entry: Mapping[str, Any]) -> Key:
    """The run of the comparison that an entry is about."""
    return Key(entry["task"], entry["recipe"], entry["seed"])


def tables(entries: Sequence[Mapping[str, Any]]) -> list[tuple[Sequence[str], list[list[str]]]]:
    """Head and rows: of every task and recipe, and of the differences of all runs of a task."""
    rows, of_task = [], defaultdict[str, list[float]](list)
    recipes = Counter(task for task, _ in {key_of(entry)[:2] for entry in entries})
    for (task, recipe), group in groupby(sorted(entries, key=key_of), key=lambda entry: key_of(entry)[:2]):
        runs = list(group)
        lora, mixture = (np.stack([as_numbers(run[name]) for run in runs]) for name in ("marks", "mixture"))
        difference = paired_difference(lora, mixture, recipes[task])
        points = 100 * (lora - mixture).mean(1)
        of_task[task] += list(points)
        ends = difference.both_95 or difference.questions_95
        row = [task, recipe, str(len(runs)), *(in_points(marks.mean(), "") for marks in (mixture, lora))]
        row += [in_points(difference.value), interval_cell(ends), difference.verdict]
        row += [in_points(points.min() / 100), in_points(points.max() / 100)]
        rows.append([*row, f"{fmean(run['kl'] for run in runs):.4f}"])
    heads = ("task", "LoRAs", "behind", "equal", "ahead", "mean", *_QUANTILES)
    return [(_COLUMNS, rows), (heads, [[task, *_distribution(points)] for task, points in of_task.items()])]


def _distribution(points: Sequence[float]) -> list[str]:
    signs = [str(sum(np.sign(point) == sign for point in points)) for sign in (-1, 0, 1)]
    quantiles = [f"{value:+.1f}" for value in np.quantile(points, list(_QUANTILES.values()))]
    return [str(len(points)), *signs, f"{fmean(points):+.1f}", *quantiles]


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The tables for a page."""
    return "\n\n".join([*(markdown_table(*each) for each in tables(entries)), note_of(entries), _effort(entries)])


def _effort(entries: Sequence[Mapping[str, Any]]) -> str:
    testing = sum(entry["seconds"]["testing"] for entry in entries)
    fitting = sum(sum(entry["seconds"].values()) for entry in entries) - testing
    return (
        f"All fits took {duration(fitting)}, the tests of the LoRAs {duration(testing)}. "
        f"Machine of each process: {computers(entry['machine'] for entry in entries)}."
    )

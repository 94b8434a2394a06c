"""Pictures of a comparison: learning curves with bands, and differences with their intervals; need matplotlib."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import numpy as np

from mola.errors import MolaError
from mola.evaluation.differences import t_interval
from mola.evaluation.evaluate import EvaluateOptions
from mola.reporting.model_card import why_no_matplotlib
from mola.studies.comparison.contrasts import Contrast
from mola.studies.comparison.marks import curve_of
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.summary import Row
from mola.studies.comparison.tables import title_of

_MARKERS = "osD^v"
_WIDTH, _HEIGHT, _LINE = 6.4, 4.0, 0.28  # inches: of a picture of curves, and of one line of differences

Band = tuple[int, float, float, float]  # step, mean accuracy, its interval over seeds
Curves = Mapping[str, Sequence[Band]]  # by recipe

NO_BAND = "no band: one seed, or all alike"
INTERVAL = "95 % interval of all differences together"

# What an answer of the base model depends on, with the defaults.
_OF_THE_BASE = {
    each.name: each.default
    for each in fields(EvaluateOptions)
    if each.name in ("template", "scoring", "max_new_tokens", "gguf_file") or "bit" in each.name
}


def check_matplotlib() -> None:
    """Refuse to draw without it.

    Raises:
        MolaError: it is not installed, or cannot be imported.
    """
    if (reason := why_no_matplotlib()) is not None:
        raise MolaError(f"`plots` needs matplotlib: {reason}. pip install 'mola-peft[plot]', or leave the option out.")


def bands(results: Sequence[Result], task: str, recipes: Sequence[str]) -> dict[str, list[Band]]:
    """Learning curves of all recipes that have one: mean over seeds and Student's 95 % interval at each step.

    They begin with the base model, but those of recipes that train an adapter on, or another base than was tested.
    """
    found: dict[str, list[Band]] = {}
    base = [each for each in results if (each.task, each.recipe) == (task, BASE)]
    for recipe in recipes:
        runs = [each for each in results if (each.task, each.recipe) == (task, recipe) and each.curve]
        if not runs:
            continue
        begins_with_base = base and all(_begins_with(each, base[0]) for each in runs)
        by_step: dict[int, list[float]] = {0: [base[0].accuracy]} if begins_with_base else {}
        for run in runs:
            for step, marks in curve_of(run):
                by_step.setdefault(step, []).append(float(marks.mean()))
        found[recipe] = [
            (step, float(np.mean(values)), *t_interval(np.array(values), 0.0, 1.0))
            for step, values in sorted(by_step.items())
        ]
    return found


def has_band(points: Sequence[Band]) -> bool:
    """Whether seeds differ anywhere along a curve."""
    return any(low < high for _, _, low, high in points)


def _begins_with(run: Result, base: Result) -> bool:
    """Whether what was tested without training is the model that a run began with, asked in the same way."""
    is_same = "adapter" not in run.fingerprints and (run.base_model, run.dtype) == (base.base_model, base.dtype)
    # Settings of runs are those that are not the defaults, of a test all.
    of_run, of_base = (
        {name: (each.settings or {}).get(name, default) for name, default in _OF_THE_BASE.items()}
        for each in (run, base)
    )
    return is_same and of_run == of_base


def draw(
    results: Sequence[Result],
    rows: Sequence[Row],
    tasks: Sequence[str],
    recipes: Sequence[str],
    form: str,
    contrasts: Sequence[Contrast] = (),
) -> bytes:
    """One picture of all tasks, as `png` or `svg`: curves where there are tests on the way, and differences."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: that would choose a window system for the whole process

    curves = {task: found for task in tasks if (found := bands(results, task, recipes))}
    tables = [
        *((f"{title}: difference to the reference", found) for title, found in _compared(rows)),
        *((f"{title}: recipes with each other", found) for title, found in _compared(contrasts)),
    ]
    heights = [_HEIGHT] * len(curves) + [1.2 + _LINE * len(compared) for _, compared in tables]
    if not heights:
        raise MolaError("`plots` has nothing to draw: no two recipes have a common seed yet, and no run has a curve.")
    strong_first = [*range(0, 20, 2), *range(1, 20, 2)]
    colors = {name: matplotlib.colormaps["tab20"](strong_first[n % 20]) for n, name in enumerate(recipes)}
    markers = {name: _MARKERS[n // 20 % len(_MARKERS)] for n, name in enumerate(recipes)}  # where colours come again
    with matplotlib.rc_context({"svg.hashsalt": "mola", "font.size": 9}):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        places = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (task, found) in zip(places, curves.items(), strict=False):
            _draw_curves(axes, task, found, colors, markers)
        for axes, (title, compared) in zip(places[len(curves) :], tables, strict=True):
            _draw_differences(axes, title, compared, colors)
        picture = io.BytesIO()
        figure.savefig(picture, format=form, dpi=130, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()


def _compared(rows: Sequence[Row] | Sequence[Contrast]) -> Iterator[tuple[str, list[Row | Contrast]]]:
    """Title and rows of all tables with an interval to draw."""
    for title, members in groupby(rows, key=title_of):
        if found := [row for row in members if row.difference is not None and row.difference.joint_95 is not None]:
            yield title, found


def _draw_curves(axes: Any, task: str, found: Curves, colors: Mapping[str, Any], markers: Mapping[str, str]) -> None:
    for recipe, points in found.items():
        steps, means, lows, highs = zip(*points, strict=True)
        axes.fill_between(steps, lows, highs, color=colors[recipe], alpha=0.12, linewidth=0)
        axes.plot(steps, means, marker=markers[recipe], markersize=3, color=colors[recipe], label=recipe)
    note = "band: 95 % interval over seeds" if any(map(has_band, found.values())) else NO_BAND
    axes.set(title=task, xlabel=f"step ({note})", ylabel="accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)


def _draw_differences(axes: Any, title: str, rows: Sequence[Row | Contrast], colors: Mapping[str, Any]) -> None:
    """The interval of all together alone: it is the one that verdicts go by."""
    for place, row in enumerate(rows):
        other = row.difference
        assert other is not None
        assert other.joint_95 is not None
        ends = [100 * bound for bound in other.joint_95]
        axes.plot(ends, [place, place], color=colors[row.recipe], linewidth=2.0)
        axes.plot(100 * other.value, place, "o", color=colors[row.recipe], markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(title=title, xlabel=f"points ({INTERVAL})", ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.grid(axis="x", alpha=0.3)


def _label(row: Row | Contrast) -> str:
    return f"{row.recipe} - {row.other}" if isinstance(row, Contrast) else row.recipe

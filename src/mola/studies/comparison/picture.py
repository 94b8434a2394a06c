"""The picture of a comparison's differences, which needs matplotlib."""

import io
from collections.abc import Sequence
from itertools import groupby

from mola.errors import MolaError
from mola.reporting.model_card import why_no_matplotlib
from mola.studies.comparison.tables import Row


def check_matplotlib() -> None:
    """Raise if matplotlib is missing or cannot be imported."""
    if (reason := why_no_matplotlib()) is not None:
        raise MolaError(f"`plots` needs matplotlib: {reason}. pip install 'mola-peft[plot]', or leave the option out.")


def draw_differences(rows: Sequence[Row], form: str) -> bytes | None:
    """One picture with a panel for each task, in the format `png` or `svg`; None if no row has an interval yet."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which chooses a window system

    compared = [row for row in rows if row.difference is not None and row.difference.interval is not None]
    parts = [(task, list(members)) for task, members in groupby(compared, key=lambda row: row.task)]
    if not parts:
        return None
    heights = [1.2 + 0.28 * len(members) for _, members in parts]  # inches
    with rc_context({"svg.hashsalt": "mola", "font.size": 9}):
        figure = Figure(figsize=(6.4, sum(heights)), layout="constrained")
        all_axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (task, members) in zip(all_axes, parts, strict=True):
            for place, row in enumerate(members):
                assert row.difference is not None
                assert row.difference.interval is not None
                scale = row.outcome.scale
                ends = [scale * bound for bound in row.difference.interval]
                axes.plot(ends, [place, place], color="C0", linewidth=2.0)
                axes.plot(scale * row.difference.value, place, "o", color="C0", markersize=5)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set(title=task, xlabel=members[0].outcome.axis, ylim=(len(members) - 0.5, -0.5))
            axes.set_yticks(range(len(members)), [row.recipe for row in members])
            axes.grid(axis="x", alpha=0.3)
        picture = io.BytesIO()
        figure.savefig(picture, format=form, dpi=130, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()

"""Draws how a step's cost grows: `python -m benchmarks.plot RESULTS.json`, results of the suite `growth`.

The picture has a row for everything that grows (experts, tokens) and a column for every dtype.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.errors import in_one_line
from mola.errors import MolaError
from mola.files.atomic import atomic_write_text, check_new_file


class Style(NamedTuple):
    """How a provider is drawn; markers differ too, for readers who see few colours."""

    label: str
    color: str
    marker: str


# Colours of Okabe and Ito.
STYLES = {
    "lora_8": Style("LoRA r 8", "#0072B2", "o"),
    "loop": Style("loop over experts", "#D55E00", "s"),
    "mola": Style("mola", "#009E73", "^"),
}
_FROZEN = Style("frozen layers", "#333333", "")  # the ratio is 1 by definition, so it is drawn as a straight line
_AXES = {"experts": ("num_experts", "experts per module"), "tokens": ("tokens", "tokens per step")}
_LOOK: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "white",  # the page around the picture may be dark
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "mola",  # the same bytes for the same results
}
_PANEL_INCHES = (4.2, 2.6)


def draw(record: dict[str, Any]) -> Any:
    """The picture of one result file, as a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    rows = record["results"]["growth"]
    grows = [over for over in _AXES if any(row["over"] == over for row in rows)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    width, height = _PANEL_INCHES[0] * len(dtypes), _PANEL_INCHES[1] * len(grows) + 1
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(grows), len(dtypes), sharey="row", squeeze=False)
    for over, row_of_panels in zip(grows, panels, strict=True):
        for dtype, axes in zip(dtypes, row_of_panels, strict=True):
            _draw_panel(axes, over, [row for row in rows if (row["over"], row["dtype"]) == (over, dtype)])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.supylabel("step time / step time of the frozen layers", fontsize=9)
    caption = textwrap.fill(_caption(record), int(19 * width))
    figure.supxlabel(caption, fontsize=7, x=0.01, ha="left", ma="left")
    return figure


def _draw_panel(axes: Any, over: str, rows: list[dict[str, Any]]) -> None:
    key, label = _AXES[over]
    ((other_key, other_label),) = (axis for name, axis in _AXES.items() if name != over)
    axes.axhline(1, color=_FROZEN.color, linewidth=0.8, linestyle="--", label=_FROZEN.label)
    for name, style in STYLES.items():
        own = sorted((row for row in rows if row["provider"] == name), key=lambda row: row[key])
        if own:
            x = [row[key] for row in own]
            median, low, high = ([row["ratio_to_frozen"][part] for row in own] for part in ("median", "p20", "p80"))
            axes.fill_between(x, low, high, color=style.color, alpha=0.2, linewidth=0)
            axes.plot(x, median, color=style.color, marker=style.marker, markersize=4.5, label=style.label)
    ticks = sorted({row[key] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.tick_params(labelleft=True)
    axes.set_xlabel(label)
    axes.set_title(f"{rows[0]['dtype']}, {rows[0][other_key]:,} {other_label}")


def _caption(record: dict[str, Any]) -> str:
    row, options, machine = record["results"]["growth"][0], record["options"], record["machine"]
    clock = "CPU" if record["device"] == "cpu" else "GPU"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{row['num_layers']} random layers with the shapes of {Path(row['model']).name}, r {row['r']}, "
        f"top_k {options['top_k']}, dropout {row['dropout']:g}. Ratios of {clock} seconds within a round: median and "
        f"20th to 80th percentile over {options['repeats']} rounds. {machine['gpu'] or machine['cpu']}, threads: "
        f"{record['threads']}; {versions}."
    )


def to_svg(draw: Callable[[], Any], title: str) -> str:
    """The figure that `draw` returns as an SVG file, in the look of all pictures; equal figures give equal texts.

    Raises:
        MolaError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MolaError('`matplotlib` draws the picture and is missing: run pip install "mola-peft[plot]".') from error
    file = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        draw().savefig(file, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    return file.getvalue().decode("utf-8")


def write_svg(path: str | Path, draw: Callable[[], Any], title: str) -> None:
    """Write the figure that `draw` returns, see `to_svg`, and print where it is."""
    print(f"Written to {atomic_write_text(path, to_svg(draw, title))}.")


@in_one_line("benchmarks.plot")
def main(arguments: list[str] | None = None) -> int:
    """Draw the picture; the exit code is 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file of `python -m benchmarks --suite growth`")
    parser.add_argument("--output", type=Path, default=Path("growth.svg"), help="SVG file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace `output` if it exists")
    options = parser.parse_args(arguments)
    record = json.loads(options.results.read_text(encoding="utf-8"))
    if not record["results"].get("growth"):
        raise MolaError(f"`results` must hold the suite growth: {str(options.results)!r} has none.")
    output = check_new_file("output", options.output, options.overwrite)
    title = "Time of a training step over that of the frozen layers, for growing numbers of experts and tokens"
    write_svg(output, lambda: draw(record), title)
    return 0


if __name__ == "__main__":
    sys.exit(main())

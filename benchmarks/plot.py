"""A picture of how a step's cost grows: `python -m benchmarks.plot RESULTS.json`, results of the suite `growth`."""

from __future__ import annotations

import io
import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.errors import in_one_line
from benchmarks.plot_data import OVER, Growth, Panel, read_growth
from mola.errors import MolaError
from mola.files.atomic import atomic_write_text, check_writable
from mola.options.fields import option
from mola.options.parsing import parse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
_FROZEN_LABEL = "frozen layers"
_SPARE = [("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P")]
_AXIS = {"experts": "experts per module", "tokens": "tokens per step"}
_INK = "#333333"
_LOOK: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "white",  # not transparent: the page around it may be dark
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # laid out for the first, which comes with matplotlib
    "font.size": 9,
    "legend.frameon": False,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar in a name is no formula
    "xtick.color": _INK,
    "ytick.color": _INK,
    # The same bytes for the same results; letters stay letters.
    "svg.fonttype": "none",
    "svg.hashsalt": "mola",
}
_PANEL_INCHES = (4.2, 2.6)
_LABELS_PER_PANEL = 2  # side by side in the legend
_INCHES_AROUND = 1.0  # legend and caption
_LETTERS_PER_INCH = 19  # of the caption's size


@dataclass
class PlotOptions:
    """Options of `python -m benchmarks.plot`.

    Raises:
        MolaError: no results, or `output` is no SVG file.
    """

    results: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON files of `python -m benchmarks --suite growth`; names without a flag come first."},
    )
    output: str = option("growth.svg", "SVG file to write.")
    model: str | None = option(None, "Whose curves, if the results hold several models.")
    overwrite: bool = option(False, "Replace `output` if it exists.")

    def __post_init__(self) -> None:
        if not self.results:
            raise MolaError("`results` must name at least one JSON file of `python -m benchmarks --suite growth`.")
        if len(set(self.results)) != len(self.results):
            raise MolaError(f"`results` names a file twice: got {' '.join(self.results)}. Name it once.")
        if Path(self.output).suffix != ".svg":
            raise MolaError(f"`output` must end in .svg, no other format is written: got {self.output!r}.")


@in_one_line("benchmarks.plot")
def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture.

    Args:
        arguments: the command line without the program; None takes the process's own.

    Returns:
        The exit code: 0, or 2 for wrong input.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--results", *arguments]
    run(parse(PlotOptions, arguments, prog="python -m benchmarks.plot", summary=__doc__ or ""))
    return 0


def run(options: PlotOptions) -> Path:
    """Read, draw and write.

    Returns:
        The SVG file.

    Raises:
        MolaError: matplotlib is missing, a file cannot be read or written, or results do not go together.
    """
    if Path(options.output).exists() and not options.overwrite:
        raise MolaError(
            f"`output` must be a new file: {options.output!r} exists. Choose another name or pass --overwrite."
        )
    growth = read_growth(options.results, options.model)
    picture = svg(growth)
    output = atomic_write_text(check_writable(options.output), picture)
    print(f"Written to {output}.")
    return output


def svg(growth: Growth) -> str:
    """The picture as SVG, the same text whenever it is drawn with the same matplotlib.

    Raises:
        MolaError: matplotlib is missing.
    """
    file = io.BytesIO()
    with _look():
        metadata = {"Title": _title(growth), "Date": None, "Creator": None}
        draw(growth).savefig(file, format="svg", metadata=metadata)
    return file.getvalue().decode("utf-8")


def draw(growth: Growth) -> Figure:
    """The picture as a figure of matplotlib: a row for everything that grows, a column for every dtype.

    Raises:
        MolaError: matplotlib is missing.
    """
    with _look():
        from matplotlib.figure import Figure

        rows = [over for over in OVER if over in {panel.over for panel in growth.panels}]
        columns = list(dict.fromkeys(panel.dtype for panel in growth.panels))
        width, height = _PANEL_INCHES[0] * len(columns), _PANEL_INCHES[1] * len(rows) + _INCHES_AROUND
        figure = Figure(figsize=(width, height), layout="constrained")
        all_axes = figure.subplots(len(rows), len(columns), sharey="row", squeeze=False)
        for axes in all_axes.flat:
            axes.set_visible(False)  # until there is something to show
        styles = _styles(growth)
        for panel in growth.panels:
            _draw_panel(all_axes[rows.index(panel.over), columns.index(panel.dtype)], panel, styles)
        lines = {line.get_label(): line for axes in all_axes.flat for line in axes.get_lines()}
        labels = [*(style.label for style in styles.values()), _FROZEN_LABEL]
        handles = [lines[label] for label in labels]
        figure.legend(handles, labels, loc="outside upper center", ncols=_LABELS_PER_PANEL * len(columns))
        figure.supylabel("step time / step time of the frozen layers", fontsize=9)
        figure.supxlabel(_caption(growth, width), fontsize=7, x=0.01, ha="left", ma="left")
        return figure


def _draw_panel(axes: Axes, panel: Panel, styles: dict[str, Style]) -> None:
    axes.set_visible(True)
    axes.axhline(1, color=_INK, linewidth=0.8, linestyle="--", label=_FROZEN_LABEL)
    for name, points in panel.curves.items():
        style, (x, median, low, high) = styles[name], zip(*points, strict=True)
        axes.fill_between(x, low, high, color=style.color, alpha=0.2, linewidth=0)
        axes.plot(x, median, color=style.color, marker=style.marker, markersize=4.5, linewidth=1.5, label=style.label)
    ticks = sorted({point.x for points in panel.curves.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelleft=True)
    axes.set_xlabel(_AXIS[panel.over])
    axes.set_title(_panel_title(panel))


def _panel_title(panel: Panel) -> str:
    (kept,) = (axis for over, axis in _AXIS.items() if over != panel.over)
    return f"{panel.dtype}, {panel.fixed:,} {kept}"


def _styles(growth: Growth) -> dict[str, Style]:
    """Of the providers that are there; one this file does not know goes by its own name."""
    names = list(dict.fromkeys(name for panel in growth.panels for name in panel.curves))
    spare = itertools.cycle(_SPARE)
    unknown = {name: Style(name, *next(spare)) for name in names if name not in STYLES}
    return {name: style for name, style in (STYLES | unknown).items() if name in names}


def _title(growth: Growth) -> str:
    """What a screen reader says."""
    labels = ", ".join(style.label for style in _styles(growth).values())
    panels = "; ".join(f"over {_AXIS[panel.over]} in {_panel_title(panel)}" for panel in growth.panels)
    return f"Time of a training step over that of the frozen layers: {labels}. Panels: {panels}."


def _caption(growth: Growth, width: float) -> str:
    sentences = (growth.setting, growth.conditions)
    return "\n".join(textwrap.fill(sentence, int(width * _LETTERS_PER_INCH)) for sentence in sentences)


@contextmanager
def _look() -> Iterator[None]:
    """Settings of matplotlib for this picture, whatever the user's own are.

    Raises:
        MolaError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MolaError('`matplotlib` draws the picture and is missing: run pip install "mola-peft[plot]".') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        yield


if __name__ == "__main__":
    sys.exit(main())

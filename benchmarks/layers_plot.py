"""`python -m benchmarks.layers_plot --output FILE.svg`: the experts of each layer, and those that one token uses."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from benchmarks.errors import in_one_line
from benchmarks.plot import write_svg
from mola.architecture.notation import resolve_per_layer
from mola.errors import MolaError
from mola.options.fields import option
from mola.options.parsing import parse

_USED, _IDLE = "#009E73", "#E3E7EA"  # a colour of Okabe and Ito, and a light grey


@dataclass
class PlotOptions:
    """Options of the picture."""

    num_experts: str = option("2468", "Experts per layer, in any notation of `mola train`.")
    num_layers: int = option(32, "Decoder layers of the model.")
    top_k: int = option(2, "Experts that each token uses.")
    output: str = option("layers.svg", "SVG file to write.")


def draw(options: PlotOptions) -> Any:
    """One row for neighbouring layers with equally many experts, as a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    rows = layer_groups(resolve_per_layer(options.num_experts, options.num_layers, "num_experts"))
    if options.top_k < 1:
        raise MolaError(f"`top_k` must be at least 1: got {options.top_k}.")
    widest = max(count for _, _, count in rows)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(figsize=(4.2, 0.9 + 0.42 * len(rows)), layout=layout)
    axes = figure.subplots()
    choice = random.Random(1)  # an example: in a model the router chooses
    for y, (_, _, count) in enumerate(rows):
        used = choice.sample(range(count), min(options.top_k, count))
        colors = [_USED if expert in used else _IDLE for expert in range(count)]
        axes.barh([y] * count, 0.84, left=[expert + 0.08 for expert in range(count)], height=0.7, color=colors)
    axes.set(xlim=(0, widest), ylim=(-0.6, len(rows) - 0.4), xticks=[])
    axes.set_yticks(range(len(rows)), [_name(first, last) for first, last, _ in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f'num_experts="{options.num_experts}", top_k={options.top_k}')
    handles = [Patch(color=_USED, label="expert that this token uses"), Patch(color=_IDLE, label="other expert")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=1, handleheight=1)
    return figure


def layer_groups(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """First layer, last layer and number of experts of each group of neighbouring layers, lowest group first."""
    groups = [list(members) for _, members in groupby(enumerate(counts), key=lambda layer: layer[1])]
    return [(members[0][0], members[-1][0], members[0][1]) for members in groups]


def _name(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"


@in_one_line("layers_plot")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture; 0, or 2 for wrong input."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(PlotOptions, words, prog="benchmarks.layers_plot", summary=str(__doc__).partition("\n")[0])
    title = "Experts in each layer, and those that one token uses"
    write_svg(options.output, lambda: draw(options), title)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.skills_plot --output FILE.svg`: what is known after each kind, one kind learnt after the other.

The records are those of `benchmarks.skills_tables`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.errors import in_one_line
from benchmarks.plot import write_svg
from benchmarks.skills_tables import WORDS, TableOptions, read
from mola.options.fields import option
from mola.options.parsing import parse

# Colours of Okabe and Ito.
_LINES = {"skills": ("#009E73", "^"), "lora": ("#0072B2", "o"), "2468": ("#D55E00", "s")}


@dataclass
class PlotOptions(TableOptions):
    """Options of the picture."""

    output: str = option("skills.svg", "SVG file to write.")


def draw(records: Sequence[Mapping[str, Any]]) -> Any:
    """Mean accuracy on all kinds learnt so far, as a `matplotlib.figure.Figure`; thin lines are single seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    stages = range(1, len(records[0]["order"]) + 1)
    for name, (color, marker) in _LINES.items():
        seeds = [curve(each["methods"][name]["stages"]) for each in records if name in each["methods"]]
        for each in seeds:
            axes.plot(stages, each, color=color, linewidth=0.6, alpha=0.3)
        if seeds:
            mean = [fmean(values) for values in zip(*seeds, strict=True)]
            label = f"{WORDS[name].replace('`', '')}, {len(seeds)} seeds"
            axes.plot(stages, mean, color=color, marker=marker, markersize=4.5, linewidth=2, label=label)
    axes.set(xlabel="kinds of questions learnt so far", ylabel="accuracy on all of them, %", ylim=(0, 103))
    axes.set_xticks(list(stages))
    axes.legend(loc="lower left")
    return figure


def curve(stages: Sequence[Sequence[str]]) -> list[float]:
    """Per cent right after each stage, over the questions of all kinds learnt by then."""
    return [100 * fmean(map(int, "".join(marks))) for marks in stages]


@in_one_line("skills_plot")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture; 0, or 2 for wrong input."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(PlotOptions, words, prog="benchmarks.skills_plot", summary=str(__doc__).partition("\n")[0])
    title = "Accuracy on all kinds of questions learnt so far, one kind after the other"
    write_svg(options.output, lambda: draw(read(options)), title)
    return 0


if __name__ == "__main__":
    sys.exit(main())

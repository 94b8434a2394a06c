"""Sections on how routers agree with each other, and on what each expert is worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from mola.architecture.layer_stacks import layer_index
from mola.reporting.charts import matrix_chart, scale, shade
from mola.reporting.commands import inspect_command, missing
from mola.reporting.formatting import kinds_of, layer_name, layer_order, number
from mola.reporting.heat import change_map
from mola.reporting.load_run import Run
from mola.reporting.markup import Element, element, figure, folded, note, table

_MOST_CHANGES = 20

Means = dict[tuple[Any, Any], float]


def agreement_section(run: Run) -> list[Element]:
    """How far the choice of one router tells that of another one, by layers and by kinds of module."""
    found = (run.inspection or {}).get("agreement")
    if not found or len(found["modules"]) < 2:
        overwrite = ["--overwrite"] if run.inspection else []
        return [missing("Whether routers agree is not known.", inspect_command(run, *overwrite))]
    names, values = found["modules"], found["cramers_v"]
    kinds = kinds_of(names)
    by_layer = _means(names, values, layer_index)
    by_kind = _means(names, values, kinds.__getitem__, same_layer=True)
    layers = sorted({layer_index(name) for name in names}, key=layer_order)
    square = [[by_layer.get((row, column)) for column in layers] for row in layers]
    text = (
        "Cramér's V of the experts that two routers choose for the same tokens, mean over pairs of modules. "
        "1: the choice of one tells that of the other; 0: it tells nothing."
    )
    known = [value for row in square for value in row if value is not None]
    charts = []
    if known:
        label = f"Agreement of routers by pairs of layers, from {min(known):.2f} to {max(known):.2f}"
        chart = matrix_chart(square, [layer_name(layer) for layer in layers], label, "layer", max(known))
        charts.append(figure(chart, "Between layers", scale(f"{max(known):.2f}")))
    if by_kind:
        charts.append(figure(_kinds_table(list(dict.fromkeys(kinds.values())), by_kind), "Within a layer, by module"))
    content = [element("p", text), element("div", charts, class_="two")]
    neighbours = _by_distance(by_layer)
    if neighbours:
        rows = [(distance, number(value)) for distance, value in neighbours]
        content.append(folded("Numbers", table(("layers apart", "agreement"), rows, "Agreement by distance of layers")))
    return content


def leave_one_out_section(run: Run) -> list[Element]:
    """How the loss changes when one expert is left out."""
    found = (run.inspection or {}).get("leave_one_out") or []
    rows = [row for row in found if row["loss_change"] is not None]
    if not rows:
        return []
    loss = (run.inspection or {}).get("leave_one_out_baseline", {}).get("loss")
    content = [
        element("p", f"Change of the loss when one expert is left out; with all of them it is {number(loss)}."),
    ]
    whole = [(row["layer_index"], row["expert"], row["loss_change"]) for row in rows if row.get("module") is None]
    if whole:
        content.append(change_map(whole, "Change of the loss"))
        content.append(note("+ the expert is of use, − the loss is lower without it."))
    single = [row for row in rows if row.get("module") is not None]
    if single:
        strongest = sorted(single, key=lambda row: -abs(row["loss_change"]))[:_MOST_CHANGES]
        lines = [(row["module"], row["expert"], f"{row['loss_change']:+.4f}") for row in strongest]
        caption = f"The {len(lines)} largest changes of {len(single):,}"
        content.append(table(("module", "expert", "change of the loss"), lines, caption))
    return content


def _means(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    key: Callable[[str], Any],
    same_layer: bool = False,
) -> Means:
    """Means over pairs of different modules, by the keys of both; `same_layer` counts pairs of one layer only."""
    sums: Mapping[tuple[Any, Any], list[float]] = defaultdict(list)
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            value = values[row][column]
            if row == column or value is None or (same_layer and layer_index(first) != layer_index(second)):
                continue
            sums[key(first), key(second)].append(value)
    return {pair: fmean(members) for pair, members in sums.items()}


def _kinds_table(kinds: Sequence[str], means: Means) -> Element:
    rows, most = [], max(means.values())
    for first in kinds:
        cells = []
        for second in kinds:
            value = means.get((first, second))
            text = "" if value is None else f"{value:.2f}".removeprefix("0")
            cells.append(element("td", text, class_=None if value is None else shade(value, most)))
        rows.append([first, *cells])
    return table(("module", *kinds), rows, class_="heat wide")


def _by_distance(means: Means) -> list[tuple[int, float]]:
    by_distance = defaultdict(list)
    for (first, second), value in means.items():
        if first is not None and second is not None and first <= second:
            by_distance[second - first].append(value)
    return [(distance, fmean(values)) for distance, values in sorted(by_distance.items())]

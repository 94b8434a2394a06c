"""Sections on the experts: how many there are, which of them work, how they changed, how alike they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from mola.insight import ROUTING_FILE
from mola.reporting.adapter_weights import LayerExperts
from mola.reporting.charts import Axis, Column, Line, Range, column_chart, line_chart, range_chart, thinned, value_axis
from mola.reporting.commands import inspect_command, missing
from mola.reporting.formatting import MOST_ROWS, NO_VALUE, layer_name, layer_order, layers, number, rows_said
from mola.reporting.heat import Choice, gate_maps
from mola.reporting.load_run import Run
from mola.reporting.markup import Element, code, element, figure, folded, note, table
from mola.reporting.routing_log import VALUES, RoutingLog

_MEANING = {
    "balance": "1: all experts weigh the same; 0: one does all",
    "entropy": "Of the router's probabilities; 1: undecided, 0: sure",
    "drift": "How far mean gates moved since the interval before; 0: not at all",
    "distance": "Frobenius distance of two experts' updates; small: they are alike",
    "input overlap": "Directions that two experts read in common; 1: the same",
    "output overlap": "Directions that two experts write in common; 1: the same",
}
_LOOKS = "cba"  # lower layers faint, upper layers strong


def allocation_section(run: Run) -> list[Element]:
    """Experts and trained values by layer."""
    if run.adapter is None:
        return [note(f"There is no adapter in the run folder; the run's status is {run.record.get('status')}.")]
    rows = run.adapter.layers
    if not rows:
        kind = run.adapter.config.get("peft_type")
        return [note(f"The adapter is of type {kind}, not a mixture of experts.")]
    experts = [Column(layer_name(row.layer_index), [row.num_experts], _said(row)) for row in rows]
    values = [Column(layer_name(row.layer_index), [row.expert_values, row.router_values], _said(row)) for row in rows]
    total = sum(row.expert_values for row in rows), sum(row.router_values for row in rows)
    few, many = min(row.num_experts for row in rows), max(row.num_experts for row in rows)
    modules = run.adapter.config.get("target_modules") or []
    named = modules if isinstance(modules, str) else ", ".join(sorted(modules))
    legend = [element("li", _square(look), name) for look, name in (("a", "experts"), ("b", "routers"))]
    charts = [
        figure(column_chart(experts, f"Experts by layer, from {few} to {many}"), "Experts of each adapted module"),
        figure(
            column_chart(values, f"Trained values by layer: {total[0]:,} of experts and {total[1]:,} of routers"),
            "Trained values",
            element("ul", legend, class_="legend"),
        ),
    ]
    sentence = f"{total[0]:,} values of experts, {total[1]:,} of routers. Adapted modules: {named}."
    return [element("p", sentence), element("div", charts, class_="two"), folded("Numbers", _allocation_table(rows))]


def gates_section(run: Run) -> tuple[list[Element], list[Choice]]:
    """Heat maps of mean gates, and the choices among them."""
    usage = run.inspection["usage"] if run.inspection is not None else {}
    if run.inspection is not None and usage and all(usage.values()):  # without routers there is nothing to show
        counted = f"Over {run.inspection['samples']:,} samples that ", code("mola inspect"), " looked at."
        maps, choices = gate_maps(usage)
        return [element("p", *counted), maps], choices
    if run.routing is not None:
        maps, choices = gate_maps({"all": run.routing.last})
        text = f"As telemetry saw them in training, in the interval that ends with step {run.routing.step}."
        more = missing("Gates by prompt, answer, kind of token and group are not known.", inspect_command(run))
        return [element("p", text), maps, more], choices
    return [missing("Nobody has looked at the experts yet.", inspect_command(run))], []


def routing_section(run: Run) -> list[Element]:
    """Balance, entropy and drift over training."""
    log = run.routing
    if log is None:
        text = element("p", "The run kept no telemetry of its routers: it has no ", code(ROUTING_FILE), ".")
        return [element("div", text, note(code("mola train"), " writes that file while it trains."), class_="missing")]
    charts = [_routing_chart(log, name) for name in VALUES if any(log.curves[name])]
    dead, together = thinned(log.dead)
    line = Line("dead experts", dead, "a")
    charts.append(
        figure(
            line_chart([line], "Experts that no token chose, by step", value_axis([value for _, value in dead]))[0],
            "Dead experts",
            note(f"Of {log.num_experts:,} in all modules, those that no token chose in an interval."),
        )
    )
    return [
        element("div", charts, class_="two"),
        note(f"A point is the mean of {together} intervals.") if together > 1 else element("span"),
        folded("Numbers", _routing_table(log)),
    ]


def redundancy_section(run: Run) -> list[Element]:
    """How alike the experts of a layer are."""
    rows = run.adapter.redundancy if run.adapter else []
    if not rows:
        return [note("No module has several experts." if run.adapter else "There is no adapter in the run folder.")]
    by_layer = defaultdict(list)
    for row in rows:
        by_layer[row.layer_index].append(row)
    values: dict[str, Callable[[Any], float]] = {
        "distance": lambda row: row.distance,
        "input overlap": lambda row: row.input_overlap,
        "output overlap": lambda row: row.output_overlap,
    }
    charts, lines = [], {layer: [layer_name(layer)] for layer in sorted(by_layer, key=layer_order)}
    for name, value in values.items():
        ranges = []
        for layer, line in lines.items():
            known = [value(row) for row in by_layer[layer] if value(row) == value(row)]
            line.append(number(fmean(known)) if known else NO_VALUE)
            if known:
                ranges.append(Range(layer_name(layer), min(known), fmean(known), max(known)))
        if ranges:
            charts.append(figure(range_chart(ranges, _by_layer(name, ranges)), name.capitalize(), note(_MEANING[name])))
    text = "Means over pairs of experts. Dot: mean over the modules of a layer; line: smallest to largest module."
    return [
        element("p", text),
        element("div", charts, class_="three"),
        folded(
            "Numbers", table(("layer", *values), lines.values(), "Likeness of experts by layer, means over modules")
        ),
    ]


def _routing_chart(log: RoutingLog, name: str) -> Element:
    lines = []
    for part, curve, look in zip(log.parts, log.curves[name], _LOOKS[-len(log.parts) :], strict=True):
        points, _ = thinned(curve)
        if points:
            lines.append(Line(f"layers {layers(part)}", points, look))
    last = "; ".join(f"{line.name} {number(line.points[-1][1])} in the end" for line in lines)
    axis = Axis(0.0, 1.0) if name != "drift" else value_axis([value for line in lines for _, value in line.points])
    return figure(line_chart(lines, f"{name} by step: {last}", axis), name.capitalize(), note(_MEANING[name]))


def _routing_table(log: RoutingLog) -> Element:
    head = ["step", *(f"{name}, layers {layers(part)}" for name in VALUES for part in log.parts), "dead"]
    curves = [dict(curve) for name in VALUES for curve in log.curves[name]]
    rows = [(step, *(number(curve.get(step)) for curve in curves), int(dead)) for step, dead in log.dead[-MOST_ROWS:]]
    return table(head, rows, f"Routers over training, means over modules{rows_said(len(log.dead))}")


def _allocation_table(rows: Sequence[LayerExperts]) -> Element:
    """One line for neighbours that are equal."""

    def figures(row: LayerExperts) -> tuple[str, ...]:
        top_k = min(row.top_k, row.num_experts)
        return tuple(f"{value:,}" for value in (row.num_experts, top_k, row.r, row.expert_values, row.router_values))

    def neighbours(place_and_row: tuple[int, LayerExperts]) -> tuple[Any, ...]:
        place, row = place_and_row
        return (row.layer_index or 0) - place, *figures(row)  # a layer that is not adapted has no row

    lines = []
    for (_, *same), members in groupby(enumerate(rows), key=neighbours):
        lines.append((layers([row.layer_index for _, row in members]), *same))
    head = ("layers", "experts", "top_k", "r", "values of experts", "values of routers")
    return table(head, lines, "Experts by layer; each figure is for one layer")


def _said(row: LayerExperts) -> str:
    return (
        f"layer {layer_name(row.layer_index)}: {row.num_experts} experts, {row.expert_values:,} values of experts, "
        f"{row.router_values:,} of routers"
    )


def _by_layer(name: str, ranges: Sequence[Range]) -> str:
    return f"{name.capitalize()} by layer, from {number(ranges[0].middle)} below to {number(ranges[-1].middle)} on top"


def _square(look: str) -> Element:
    bar = element("rect", x="15%", y="15%", width="70%", height="70%", class_=f"bar {look}")
    return element("svg", bar, class_="swatch small", aria_hidden="true")

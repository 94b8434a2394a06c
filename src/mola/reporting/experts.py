"""The experts: how many there are, which of them work, how they changed, how alike they are."""

from collections import defaultdict
from statistics import fmean
from typing import Any

from mola.insight import ROUTING_FILE
from mola.reporting.adapter_weights import LayerExperts, own_numbers
from mola.reporting.charts import Axis, Column, Line, Range, thinned, value_axis
from mola.reporting.commands import inspect_command
from mola.reporting.document import Table
from mola.reporting.formatting import MOST_ROWS, NO_VALUE, layer_name, layer_order, layers, number, rows_said
from mola.reporting.heat import GateMaps, gate_maps
from mola.reporting.layers_table import layers_table
from mola.reporting.load_run import Run
from mola.reporting.routing_log import VALUES, RoutingLog

_LOOKS = "cba"  # lower layers faint, upper layers strong


def allocation_section(run: Run) -> dict[str, Any]:
    """Experts and trained values by layer."""
    rows = run.adapter.layers if run.adapter else []
    # The configuration of another method may hold anything.
    config = run.adapter.config if run.adapter and rows else {}
    modules, stacks = config.get("target_modules") or [], config.get("target_parameters") or []
    names = [*([modules] if isinstance(modules, str) else sorted(modules)), *stacks]
    return {
        "adapter": run.adapter,
        "status": run.record.get("status"),
        "modules": ", ".join(names),
        "own_numbers": own_numbers(config) if rows else "",
        "experts": [Column(layer_name(row.layer_index), [row.most], _said(row)) for row in rows],
        "trained": [
            Column(layer_name(row.layer_index), [row.expert_values, row.router_values], _said(row)) for row in rows
        ],
        "numbers": layers_table(rows),
    }


def gates_section(run: Run) -> dict[str, Any]:
    """Heat maps of mean gates: of the inspection, else of the telemetry."""
    usage = run.inspection["usage"] if run.inspection is not None else {}
    if run.inspection is not None and usage and all(usage.values()):  # without routers there is nothing to show
        return _gates(gate_maps(usage), samples=run.inspection["samples"])
    if run.routing is not None:
        return _gates(gate_maps({"all": run.routing.last}), step=run.routing.step, command=inspect_command(run))
    return _gates(None, command=inspect_command(run))


def routing_section(run: Run) -> dict[str, Any]:
    """Balance, entropy and drift over training."""
    log = run.routing
    if log is None:
        return {"log": None, "file": ROUTING_FILE}
    charts = []
    for name in (name for name in VALUES if any(log.curves[name])):
        lines = [
            Line(f"layers {layers(part)}", thinned(curve)[0], look)
            for part, curve, look in zip(log.parts, log.curves[name], _LOOKS[-len(log.parts) :], strict=True)
            if curve
        ]
        is_share = name != "drift"
        axis = Axis(0.0, 1.0) if is_share else value_axis([value for line in lines for _, value in line.points])
        charts.append((name, lines, axis))
    dead, together = thinned(log.dead)
    return {
        "log": log,
        "charts": charts,
        "dead": Line("dead experts", dead, "a"),
        "dead_axis": value_axis([value for _, value in dead], is_whole=True),
        "together": together,
        "numbers": _routing_table(log),
    }


def redundancy_section(run: Run) -> dict[str, Any]:
    """How alike the experts of a layer are."""
    rows = run.adapter.redundancy if run.adapter else []
    if not rows:
        return {"numbers": None, "has_adapter": run.adapter is not None}
    by_layer = defaultdict(list)
    for row in rows:
        by_layer[row.layer_index].append(row)
    names = ("distance", "input overlap", "output overlap")
    charts: dict[str, list[Range]] = {name: [] for name in names}
    lines = []
    for layer, members in sorted(by_layer.items(), key=lambda item: layer_order(item[0])):
        line = [layer_name(layer)]
        for name in names:
            values = [getattr(row, name.replace(" ", "_")) for row in members]
            known = [value for value in values if value == value]  # not a number: a factor spans nothing
            line.append(number(fmean(known)) if known else NO_VALUE)
            if known:
                charts[name].append(Range(layer_name(layer), min(known), fmean(known), max(known)))
        lines.append(line)
    caption = "Likeness of experts by layer, means over modules"
    return {
        "charts": [(name, ranges) for name, ranges in charts.items() if ranges],
        "numbers": Table(("layer", *names), lines, caption),
    }


def _gates(
    maps: GateMaps | None, samples: int | None = None, step: int | None = None, command: str | None = None
) -> dict[str, Any]:
    choices = maps.choices if maps else ()
    return {"maps": maps, "choices": choices, "samples": samples, "step": step, "command": command}


def _routing_table(log: RoutingLog) -> Table:
    head = ["step", *(f"{name}, layers {layers(part)}" for name in VALUES for part in log.parts), "dead"]
    curves = [dict(curve) for name in VALUES for curve in log.curves[name]]
    rows = [(step, *(number(curve.get(step)) for curve in curves), int(dead)) for step, dead in log.dead[-MOST_ROWS:]]
    return Table(head, rows, f"Routers over training, means over modules{rows_said(len(log.dead))}")


def _said(row: LayerExperts) -> str:
    return (
        f"layer {layer_name(row.layer_index)}: {row.experts_said} experts, {row.expert_values:,} values of experts, "
        f"{row.router_values:,} of routers"
    )

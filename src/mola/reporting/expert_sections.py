"""Sections about the experts: their number, which of them are used, how alike they are, how routers agree."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from mola.architecture.layer_names import layer_index, module_kinds
from mola.insight import ROUTING_FILE
from mola.reporting.adapter_weights import LayerExperts, layers_table, pattern_sentence, target_names
from mola.reporting.charts import Axis, Column, Line, Range, shade, thinned, value_axis
from mola.reporting.commands import inspect_command
from mola.reporting.document import Table
from mola.reporting.formatting import MAX_ROWS, NO_VALUE, layer_name, layer_order, layer_range, number, rows_note
from mola.reporting.heatmaps import Cell, GateMaps, HeatMap, change_map, gate_maps
from mola.reporting.load_run import Run
from mola.reporting.routing_log import VALUES, RoutingLog

_CSS_CLASSES = "cba"  # classes of curves: lower layers faint, upper layers strong
_MAX_CHANGES = 20  # rows of single modules in a table

# ---------------------------------------------------------------------- numbers of experts, and their use


def allocation_section(run: Run) -> dict[str, Any]:
    """Experts and trainable parameters by layer."""
    rows = run.adapter.layers if run.adapter else []
    # Without rows the adapter is of a different method, whose configuration may have values of different types.
    config = run.adapter.config if run.adapter and rows else {}
    columns = [(layer_name(row.layer_index), row, _layer_title(row)) for row in rows]
    return {
        "adapter": run.adapter,
        "status": run.record.get("status"),
        "modules": ", ".join(target_names(config)),
        "own_numbers": pattern_sentence(config),
        "experts": [Column(name, [row.most], title) for name, row, title in columns],
        "trained": [Column(name, [row.expert_values, row.router_values], title) for name, row, title in columns],
        "numbers": layers_table(rows),
    }


def _layer_title(row: LayerExperts) -> str:
    return (
        f"layer {layer_name(row.layer_index)}: {row.experts_text} experts, "
        f"{row.expert_values:,} parameters of experts, {row.router_values:,} of routers"
    )


def gates_section(run: Run) -> dict[str, Any]:
    """Heat maps of mean gates, from the inspection if there is one, else from the telemetry."""
    usage = run.inspection["usage"] if run.inspection is not None else {}
    maps: GateMaps | None = None
    samples = step = None
    if run.inspection is not None and usage and all(usage.values()):  # an empty list: the adapter has no routers
        maps, samples = gate_maps(usage), run.inspection["samples"]
    elif run.routing is not None:
        maps, step = gate_maps({"all": run.routing.last}), run.routing.step
    return {
        "maps": maps,
        "choices": maps.choices if maps else (),
        "samples": samples,
        "step": step,
        "command": None if samples is not None else inspect_command(run),
    }


def routing_section(run: Run) -> dict[str, Any]:
    """Balance, entropy, drift and dead experts over training."""
    log = run.routing
    if log is None:
        return {"log": None, "file": ROUTING_FILE}
    charts = []
    for name in (name for name in VALUES if any(log.curves[name])):
        lines = [
            Line(f"layers {layer_range(part)}", thinned(curve)[0], css_class)
            for part, curve, css_class in zip(log.parts, log.curves[name], _CSS_CLASSES[-len(log.parts) :], strict=True)
            if curve
        ]
        values = [value for line in lines for _, value in line.points]
        charts.append((name, lines, value_axis(values) if name == "drift" else Axis(0.0, 1.0)))
    dead, points_per_mean = thinned(log.dead)
    return {
        "log": log,
        "charts": charts,
        "dead": Line("dead experts", dead, "a"),
        "dead_axis": value_axis([value for _, value in dead], is_whole=True),
        "points_per_mean": points_per_mean,
        "numbers": _routing_table(log),
    }


def _routing_table(log: RoutingLog) -> Table:
    head = ["step", *(f"{name}, layers {layer_range(part)}" for name in VALUES for part in log.parts), "dead"]
    curves = [dict(curve) for name in VALUES for curve in log.curves[name]]
    rows = [(step, *(number(curve.get(step)) for curve in curves), int(dead)) for step, dead in log.dead[-MAX_ROWS:]]
    return Table(head, rows, f"Routers over training, means over modules{rows_note(len(log.dead))}")


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
    for layer in sorted(by_layer, key=layer_order):
        line = [layer_name(layer)]
        for name in names:
            values = [getattr(row, name.replace(" ", "_")) for row in by_layer[layer]]
            known = [value for value in values if value == value]  # NaN if a factor is zero
            line.append(number(fmean(known)) if known else NO_VALUE)
            if known:
                charts[name].append(Range(layer_name(layer), min(known), fmean(known), max(known)))
        lines.append(line)
    caption = "Likeness of experts by layer, means over modules"
    return {
        "charts": [(name, ranges) for name, ranges in charts.items() if ranges],
        "numbers": Table(("layer", *names), lines, caption),
    }


# ---------------------------------------------------------------------- agreement of routers, worth of an expert

Means = dict[tuple[Any, Any], float]


def has_agreement(inspection: Mapping[str, Any]) -> bool:
    """Whether an inspection has compared at least two routers."""
    return len((inspection.get("agreement") or {"modules": []})["modules"]) > 1


def may_have_agreement(run: Run) -> bool:
    """Whether the run's inspection shows how routers agree, or a new inspection could show it."""
    has_been_measured = (run.inspection or {}).get("agreement") is not None
    return run.has_routers and (not has_been_measured or has_agreement(run.inspection or {}))


def agreement_section(run: Run) -> dict[str, Any]:
    """How well the choice of one router predicts the choice of another, by layers and by kinds of modules."""
    if run.inspection is None or not has_agreement(run.inspection):
        return {"command": inspect_command(run)}
    names, values = (run.inspection["agreement"][key] for key in ("modules", "cramers_v"))
    kinds = module_kinds(names)
    by_layer = pair_means(names, values, layer_index)
    by_kind = pair_means(names, values, kinds.__getitem__, same_layer=True)
    layers = sorted({layer_index(name) for name in names}, key=layer_order)
    square = [[by_layer.get((row, column)) for column in layers] for row in layers]
    by_distance = defaultdict(list)
    for (first, second), value in by_layer.items():
        if first is not None and second is not None and first <= second:
            by_distance[second - first].append(value)
    distances = [(distance, number(fmean(members))) for distance, members in sorted(by_distance.items())]
    return {
        "command": None,
        "square": square,
        "known": [value for row in square for value in row if value is not None],
        "layers": [layer_name(layer) for layer in layers],
        "kinds": _kinds_map(list(dict.fromkeys(kinds.values())), by_kind) if by_kind else None,
        "numbers": Table(("layers apart", "agreement"), distances, "Agreement by distance of layers"),
    }


def pair_means(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    key: Callable[[str], Any],
    same_layer: bool = False,
) -> Means:
    """Mean values over pairs of different modules, grouped by the keys of both modules.

    Args:
        names: names of the modules.
        values: value of each pair of modules.
        key: gives the key of a module from its name, such as its layer.
        same_layer: whether only pairs within one layer count.
    """
    keys, layers = [key(name) for name in names], [layer_index(name) for name in names]
    pairs = defaultdict(list)
    for row, first in enumerate(keys):
        for column, second in enumerate(keys):
            value = values[row][column]
            if row != column and value is not None and (layers[row] == layers[column] or not same_layer):
                pairs[first, second].append(value)
    return {pair: fmean(members) for pair, members in pairs.items()}


def _kinds_map(kinds: Sequence[str], means: Means) -> HeatMap:
    largest = max(means.values())
    cells = {pair: Cell(f"{value:.2f}".removeprefix("0"), shade(value, largest)) for pair, value in means.items()}
    rows = [(first, [cells.get((first, second), Cell()) for second in kinds]) for first in kinds]
    return HeatMap("", "module", kinds, rows)


def leave_one_out_section(run: Run) -> dict[str, Any] | None:
    """How the loss changes without one expert."""
    inspection = run.inspection or {}
    rows = [row for row in inspection.get("leave_one_out") or [] if row["loss_change"] is not None]
    if not rows:
        return None
    of_layers = [(row["layer_index"], row["expert"], row["loss_change"]) for row in rows if row.get("module") is None]
    of_modules = [row for row in rows if row.get("module") is not None]
    largest = sorted(of_modules, key=lambda row: -abs(row["loss_change"]))[:_MAX_CHANGES]
    lines = [(row["module"], row["expert"], f"{row['loss_change']:+.4f}") for row in largest]
    caption = f"The {len(lines)} largest changes of {len(of_modules):,}"
    return {
        **{name: (inspection.get("leave_one_out_baseline") or {}).get(name) for name in ("loss", "samples")},
        "map": change_map(of_layers, "Change of the loss") if of_layers else None,
        "largest": Table(("module", "expert", "change of the loss"), lines, caption) if lines else None,
    }

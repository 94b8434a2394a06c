"""How routers agree with each other, and what each expert is worth."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from mola.architecture.layer_stacks import layer_index, module_kinds
from mola.reporting.charts import shade
from mola.reporting.commands import inspect_command
from mola.reporting.document import Table
from mola.reporting.formatting import layer_name, layer_order, number
from mola.reporting.heat import Cell, HeatMap, change_map
from mola.reporting.load_run import Run

_MOST_CHANGES = 20

Means = dict[tuple[Any, Any], float]


def has_agreement(inspection: Mapping[str, Any] | None) -> bool:
    """Whether there are two routers that may agree."""
    found = (inspection or {}).get("agreement") or {"modules": []}
    return len(found["modules"]) > 1


def may_agree(run: Run) -> bool:
    """Whether a look at the run's experts shows, or could show, how routers agree."""
    found = (run.inspection or {}).get("agreement")
    return run.has_routers and (found is None or len(found["modules"]) > 1)


def agreement_section(run: Run) -> dict[str, Any]:
    """How far the choice of one router tells that of another one, by layers and by kinds of module."""
    if run.inspection is None or not has_agreement(run.inspection):
        return {"command": inspect_command(run)}
    names, values = (run.inspection["agreement"][key] for key in ("modules", "cramers_v"))
    kinds = module_kinds(names)
    by_layer = pair_means(names, values, layer_index)
    by_kind = pair_means(names, values, kinds.__getitem__, same_layer=True)
    layers = sorted({layer_index(name) for name in names}, key=layer_order)
    square = [[by_layer.get((row, column)) for column in layers] for row in layers]
    distances = [(distance, number(value)) for distance, value in _by_distance(by_layer)]
    return {
        "command": None,
        "square": square,
        "known": [value for row in square for value in row if value is not None],
        "layers": [layer_name(layer) for layer in layers],
        "kinds": _kinds_map(list(dict.fromkeys(kinds.values())), by_kind) if by_kind else None,
        "numbers": Table(("layers apart", "agreement"), distances, "Agreement by distance of layers"),
    }


def leave_one_out_section(run: Run) -> dict[str, Any] | None:
    """How the loss changes when one expert is left out."""
    inspection = run.inspection or {}
    rows = [row for row in inspection.get("leave_one_out") or [] if row["loss_change"] is not None]
    if not rows:
        return None
    whole = [(row["layer_index"], row["expert"], row["loss_change"]) for row in rows if row.get("module") is None]
    single = [row for row in rows if row.get("module") is not None]
    strongest = sorted(single, key=lambda row: -abs(row["loss_change"]))[:_MOST_CHANGES]
    lines = [(row["module"], row["expert"], f"{row['loss_change']:+.4f}") for row in strongest]
    caption = f"The {len(lines)} largest changes of {len(single):,}"
    return {
        **{name: (inspection.get("leave_one_out_baseline") or {}).get(name) for name in ("loss", "samples")},
        "map": change_map(whole, "Change of the loss") if whole else None,
        "largest": Table(("module", "expert", "change of the loss"), lines, caption) if lines else None,
    }


def pair_means(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    key: Callable[[str], Any],
    same_layer: bool = False,
) -> Means:
    """Means over pairs of different modules, by the keys of both; `same_layer` counts pairs of one layer only."""
    keys, layers = [key(name) for name in names], [layer_index(name) for name in names]
    sums = defaultdict(list)
    for row, first in enumerate(keys):
        for column, second in enumerate(keys):
            value = values[row][column]
            if row != column and value is not None and (layers[row] == layers[column] or not same_layer):
                sums[first, second].append(value)
    return {pair: fmean(members) for pair, members in sums.items()}


def _kinds_map(kinds: Sequence[str], means: Means) -> HeatMap:
    most = max(means.values())
    shown = {pair: Cell(f"{value:.2f}".removeprefix("0"), shade(value, most)) for pair, value in means.items()}
    rows = [(first, [shown.get((first, second), Cell()) for second in kinds]) for first in kinds]
    return HeatMap("", "module", kinds, rows)


def _by_distance(means: Means) -> list[tuple[int, float]]:
    by_distance = defaultdict(list)
    for (first, second), value in means.items():
        if first is not None and second is not None and first <= second:
            by_distance[second - first].append(value)
    return [(distance, fmean(values)) for distance, values in sorted(by_distance.items())]

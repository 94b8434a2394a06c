"""What routers did over training: the telemetry of a run, summed up while it is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from mola.insight.usage import is_short_interval
from mola.reporting.formatting import layer_order

VALUES = ("balance", "entropy", "drift")
_PARTS = 3  # lower, middle and upper layers


@dataclass(frozen=True)
class RoutingLog:
    """The telemetry of a run."""

    parts: Sequence[Sequence[int]]  # neighbouring layers whose modules are averaged, lowest first
    # name of a value -> for each part, its mean over the modules by step
    curves: Mapping[str, Sequence[list[tuple[int, float]]]]
    dead: list[tuple[int, float]]  # by step, how many experts no token chose, over all modules
    num_experts: int  # experts of all modules that have a router
    # the records of the last interval whose gates are numbers and that is none of a few steps, one per module
    last: Sequence[Mapping[str, Any]]
    step: int  # the step at its end


def read_routing_log(entries: Iterable[Mapping[str, Any]]) -> RoutingLog | None:
    """Sum up the lines of `routing.jsonl`, `step` and `modules` of each interval in order; None without any."""
    parts: list[list[int]] = []
    curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in VALUES}
    dead: list[tuple[int, float]] = []
    whole: list[tuple[Sequence[Mapping[str, Any]], int]] = []  # the last two intervals whose gates are numbers
    for entry in entries:
        modules, step = entry["modules"], entry["step"]
        if not modules:
            continue
        if not parts:
            parts = layer_parts([module["layer_index"] for module in modules])
            for name in VALUES:
                curves[name] = [[] for _ in parts]
        for name in VALUES:
            for curve, layers in zip(curves[name], parts, strict=True):
                values = [module.get(name) for module in modules if module["layer_index"] in layers]
                known = [value for value in values if value is not None]
                if known:
                    curve.append((step, fmean(known)))
        dead.append((step, sum(len(module["dead_experts"]) for module in modules)))
        if not any(gate is None for module in modules for gate in module["mean_gates"]):
            whole = [*whole[-1:], (modules, step)]
    if not whole:
        return None
    last, last_step = whole[0] if is_short_interval(whole[-1][0], whole[0][0]) else whole[-1]
    num_experts = sum(len(module["mean_gates"]) for module in last)
    return RoutingLog(parts, curves, dead, num_experts, last, last_step)


def layer_parts(indices: Iterable[int | None]) -> list[list[int]]:
    """Three parts of neighbouring layers, as equal as can be, of the layers with routers; fewer with fewer layers."""
    layers: list[Any] = sorted(set(indices), key=layer_order)
    bounds = [round(len(layers) * part / _PARTS) for part in range(_PARTS + 1)]
    return [layers[start:end] for start, end in pairwise(bounds) if end > start]

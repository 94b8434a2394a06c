"""Reads the telemetry of a run, `routing.jsonl`: its curves over training, and the use of experts at the end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from mola.files.reading import read_json_lines
from mola.insight import is_short_interval
from mola.reporting.formatting import layer_order

VALUES = ("balance", "entropy", "drift")
_NUM_PARTS = 3  # lower, middle and upper layers
_LATE_SHARE = 0.25  # share of the training

# ---------------------------------------------------------------------- curves over training


@dataclass(frozen=True)
class RoutingLog:
    """The telemetry of a run, averaged over modules."""

    parts: Sequence[Sequence[int | None]]  # neighbouring layers whose modules are averaged, lowest first
    # name of a value -> for each part, its mean over the modules by step
    curves: Mapping[str, Sequence[list[tuple[int, float]]]]
    dead: list[tuple[int, float]]  # by step, the number of experts in all modules that no token chose
    num_experts: int  # experts of all modules that have a router
    # records of the last interval with finite gates, one per module; a short last interval does not count
    last: Sequence[Mapping[str, Any]]
    step: int  # the step at the end of that interval


def read_routing_log(lines: Iterable[Mapping[str, Any]]) -> RoutingLog | None:
    """Average the lines of a `routing.jsonl`; None if no line has finite gates."""
    parts: list[list[int | None]] = []
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    dead: list[tuple[int, float]] = []
    finite: list[tuple[Sequence[Mapping[str, Any]], int]] = []  # the last two intervals with finite gates
    for line in lines:
        modules, step = line["modules"], line["step"]
        if not modules:
            continue
        if not parts:
            parts = layer_parts([module["layer_index"] for module in modules])
            curves = {name: [[] for _ in parts] for name in VALUES}
        for name in VALUES:
            for curve, layers in zip(curves[name], parts, strict=True):
                values = [module.get(name) for module in modules if module["layer_index"] in layers]
                known = [value for value in values if value is not None]
                if known:
                    curve.append((step, fmean(known)))
        dead.append((step, sum(len(module["dead_experts"]) for module in modules)))
        if not any(gate is None for module in modules for gate in module["mean_gates"]):
            finite = [*finite[-1:], (modules, step)]
    if not finite:
        return None
    last, step = finite[0] if is_short_interval(finite[-1][0], finite[0][0]) else finite[-1]
    return RoutingLog(parts, curves, dead, sum(len(module["mean_gates"]) for module in last), last, step)


def layer_parts(indices: Iterable[int | None]) -> list[list[int | None]]:
    """Split the layers with routers into three parts of neighbouring layers, as equal as possible.

    With fewer than three layers there are fewer parts.
    """
    layers = sorted(set(indices), key=layer_order)
    bounds = [round(len(layers) * part / _NUM_PARTS) for part in range(_NUM_PARTS + 1)]
    return [layers[start:end] for start, end in pairwise(bounds) if end > start]


# ---------------------------------------------------------------------- the end of training


@dataclass
class LateUse:
    """Use of one module's experts over the tokens of the last quarter of training.

    Attributes:
        tokens: number of tokens.
        shares: for each expert, the share of tokens that chose it; shares add up to `top_k`.
        margin: mean difference between the largest and the second largest gate.
        entropy: mean entropy of the softmax over all experts, divided by its maximum.
    """

    tokens: int = 0
    shares: list[float] = field(default_factory=list)
    margin: float = 0.0
    entropy: float = 1.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an interval to the means, weighted by its tokens."""
        self.tokens += record["num_tokens"]
        weight = record["num_tokens"] / self.tokens if self.tokens else 0.0
        before = self.shares or [0.0] * len(record["shares"])
        self.shares = [old + weight * (new - old) for old, new in zip(before, record["shares"], strict=True)]
        # A value that was not finite, or that an earlier version did not record, counts as 1, which no rule reports.
        margin, entropy = (1.0 if record.get(name) is None else record[name] for name in ("margin", "entropy"))
        self.margin += weight * (margin - self.margin)
        self.entropy += weight * (entropy - self.entropy)

    @property
    def top_k(self) -> int:
        """Number of experts that a token chooses."""
        return round(sum(self.shares))


def read_late_use(path: Path, last_step: int = 0) -> dict[str, LateUse]:
    """Use of experts in the last quarter of training, by module; empty if it has no line.

    Args:
        path: the `routing.jsonl` of the run.
        last_step: the run's last step; the last step of the telemetry is used if it is later.
    """
    for line in read_json_lines(path):  # read twice, since the file of a large model does not fit into memory
        last_step = max(last_step, line["step"])
    modules: dict[str, LateUse] = {}
    for line in read_json_lines(path):
        if line["step"] > (1 - _LATE_SHARE) * last_step:
            for record in line["modules"]:
                modules.setdefault(record["module"], LateUse()).add(record)
    return modules

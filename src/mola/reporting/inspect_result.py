"""What `mola inspect` found, and its table by layer."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from mola.files.environment import software_versions
from mola.insight.ablation import LeftOut
from mola.insight.inspection import ModuleRedundancy, to_records
from mola.insight.usage import ModuleUsage
from mola.reporting.agreement import pair_means

_CAPTION = (
    "Means over the modules of a layer; dead: experts that no token chose; agreement: of the modules' choices with "
    "each other, and with those of the layer below."
)


@dataclass(frozen=True)
class InspectResult:
    """What was seen.

    Attributes:
        usage: use of experts by module, over `all` tokens, the `prompt`, the `answer`, and every group of samples.
        redundancy: likeness of experts by module.
        agreement: `modules`, and `cramers_v` of every pair of them.
        examples: some samples with the mean gates over their answers.
        samples: how many samples were looked at.
        settings: the options.
        leave_one_out: change of the loss without each expert; None unless asked for.
        leave_one_out_baseline: `loss` of the whole model and the number of `samples` it was measured on.
    """

    usage: dict[str, list[ModuleUsage]]
    redundancy: list[ModuleRedundancy]
    agreement: dict[str, Any]
    examples: list[dict[str, Any]]
    samples: int
    settings: dict[str, Any]
    leave_one_out: list[LeftOut] | None = None
    leave_one_out_baseline: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "samples": self.samples,
            "usage": {name: to_records(rows) for name, rows in self.usage.items()},
            "redundancy": to_records(self.redundancy),
            "agreement": self.agreement,
            "examples": self.examples,
            "leave_one_out": None if self.leave_one_out is None else to_records(self.leave_one_out),
            "leave_one_out_baseline": self.leave_one_out_baseline,
            "settings": self.settings,
            "versions": software_versions(),
        }


def result_table(result: InspectResult) -> Table:
    """Means by layer, as a table for `rich.print`."""
    table = Table(title=escape(f"{result.settings['adapter']}: {result.samples} samples"), caption=_CAPTION)
    columns = ["layer", "experts", "balance", "entropy", "margin", "dead", "distance", "input overlap"]
    columns += ["output overlap", "agreement", "below"]
    if result.leave_one_out is not None:
        columns += [
            f"loss without an expert, {(result.leave_one_out_baseline or {})['samples']} samples, least",
            "most",
        ]
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")  # no digit is cut
    usage, redundancy, left_out = (
        _by_layer(rows) for rows in (result.usage["all"], result.redundancy, result.leave_one_out or ())
    )
    index_of = {row.module: row.layer_index for row in result.usage["all"]}
    agreement = pair_means(result.agreement["modules"], result.agreement["cramers_v"], index_of.__getitem__)
    for layer, rows in usage.items():
        others, below = redundancy[layer], None if layer is None else layer - 1
        cells = [
            "-" if layer is None else str(layer),
            ", ".join(str(number) for number in sorted({len(row.shares) for row in rows})),
            *(f"{fmean(getattr(row, name) for row in rows):.2f}" for name in ("balance", "entropy", "margin")),
            str(sum(len(row.dead_experts) for row in rows)),
            f"{fmean(row.distance for row in others):.3g}",
            _two_digits(_known_mean([row.input_overlap for row in others])),
            _two_digits(_known_mean([row.output_overlap for row in others])),
            _two_digits(agreement.get((layer, layer), math.nan)),
            _two_digits(math.nan if layer is None else agreement.get((layer, below), math.nan)),
        ]
        changes = [row.loss_change for row in left_out[layer]]
        table.add_row(*cells, *(f"{pick(changes):+.4f}" for pick in (min, max) if changes))
    return table


def _by_layer(rows: Sequence[Any]) -> dict[int | None, list[Any]]:
    layers = defaultdict(list)
    for row in rows:
        layers[row.layer_index].append(row)
    return layers


def _known_mean(values: Sequence[float]) -> float:
    """Mean of those that are numbers: an expert whose factor is still 0 spans nothing that could overlap."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _two_digits(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"  # not a number: a factor is zero, or there is no pair

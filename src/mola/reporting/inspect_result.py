"""The result of `mola inspect`, and its table by layer."""

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
from mola.reporting.expert_sections import pair_means

_CAPTION = (
    "Means over the modules of a layer. dead: experts that no token chose; agreement: between the choices of the "
    "modules of a layer; below: between their choices and those of the layer below."
)


@dataclass(frozen=True)
class InspectResult:
    """The measurements of `mola inspect`.

    Attributes:
        usage: use of experts by module, over `all` tokens, the `prompt`, the `answer`, and every group of samples.
        redundancy: how alike the experts of each module are.
        agreement: `modules`, and `cramers_v` of every pair of them.
        examples: some samples with the mean gates over their answers.
        samples: the number of inspected samples.
        settings: the options of the command.
        leave_one_out: change of the loss without each expert; None if it was not measured.
        leave_one_out_baseline: `loss` of the whole model and the number of `samples` for that loss.
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
    """Means by layer, as a table for `rich`."""
    table = Table(title=escape(f"{result.settings['adapter']}: {result.samples} samples"), caption=_CAPTION)
    columns = ["layer", "experts", "balance", "entropy", "margin", "dead", "distance", "input overlap"]
    columns += ["output overlap", "agreement", "below"]
    if result.leave_one_out is not None:
        samples = (result.leave_one_out_baseline or {})["samples"]
        columns += [f"loss without an expert, {samples} samples, least", "most"]
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")  # no digit is cut
    redundancy, left_out = _by_layer(result.redundancy), _by_layer(result.leave_one_out or ())
    index_of = {row.module: row.layer_index for row in result.usage["all"]}
    agreement = pair_means(result.agreement["modules"], result.agreement["cramers_v"], index_of.__getitem__)
    for layer, rows in _by_layer(result.usage["all"]).items():
        below = None if layer is None else agreement.get((layer, layer - 1))
        changes = [row.loss_change for row in left_out[layer]]
        table.add_row(
            "-" if layer is None else str(layer),
            ", ".join(str(number) for number in sorted({len(row.shares) for row in rows})),
            *(f"{fmean(getattr(row, name) for row in rows):.2f}" for name in ("balance", "entropy", "margin")),
            str(sum(len(row.dead_experts) for row in rows)),
            f"{fmean(row.distance for row in redundancy[layer]):.3g}",
            _mean_text([row.input_overlap for row in redundancy[layer]]),
            _mean_text([row.output_overlap for row in redundancy[layer]]),
            _mean_text([agreement.get((layer, layer))]),
            _mean_text([below]),
            *(f"{pick(changes):+.4f}" for pick in (min, max) if changes),
        )
    return table


def _by_layer(rows: Sequence[Any]) -> dict[int | None, list[Any]]:
    layers = defaultdict(list)
    for row in rows:
        layers[row.layer_index].append(row)
    return layers


def _mean_text(values: Sequence[float | None]) -> str:
    """Mean of the known values as text; an overlap is NaN if a factor is still zero."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return f"{fmean(known):.2f}" if known else "-"

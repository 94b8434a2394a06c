"""How near a LoRA is to the mixture that it was made from, as a value, a table and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from mola.architecture.layer_stacks import module_kinds
from mola.files.environment import machine_description, software_versions
from mola.reporting.formatting import points

REPORT_FILE = "export.json"


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how near it is.

    Attributes:
        output: the folder written; `export.json` in it holds this report.
        method: regression, mean or usage.
        rank: asked for.
        modules: how many linears.
        exact: how many of them had one expert, which is a LoRA as it is.
        explained: of each module, the share of the mixture's squared update on held-out tokens that the LoRA has,
            `1 - E ||y - B A x||^2 / E ||y||^2`; None without data.
        divergence: mean KL(mixture || LoRA) of held-out rows in nats, by kind of tokens: `answer` of the data,
            `test answer` of the test file, `text`.
        loss: mean loss of base, mixture and LoRA on the same tokens.
        accuracy: of `base`, `mixture` and `lora` on the test file.
        differences: of `lora` and `base` from the mixture on the same questions, with an interval over questions.
        rows: how many rows were fitted and held out, by kind.
        seconds: by step.
        notes: what the reader of the report should know.
        settings: the options.
    """

    output: Path
    method: str
    rank: int
    modules: int
    exact: int
    explained: dict[str, float | None] | None = None
    divergence: dict[str, float] = field(default_factory=dict)
    loss: dict[str, dict[str, float]] = field(default_factory=dict)
    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    differences: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def by_kind(self) -> dict[str, float]:
        """Mean explained share of the modules of each kind that have several experts; empty without data."""
        known = {name: value for name, value in (self.explained or {}).items() if value is not None}
        values: dict[str, list[float]] = {}
        for name, kind in module_kinds(known).items():
            values.setdefault(kind, []).append(known[name])
        return {kind: fmean(each) for kind, each in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        more = {"explained_by_kind": self.by_kind(), "versions": software_versions(), "machine": machine_description()}
        return asdict(self) | {"output": str(self.output)} | more

    def table(self) -> Table:
        """What routing is worth, for the terminal."""
        title = f"mixture to LoRA of rank {self.rank}, {self.method}"
        table = Table(title=escape(title), caption="Measured on held-out rows.")
        for column in ("", "value", "95 % interval"):
            table.add_column(column)
        for kind, value in self.by_kind().items():
            table.add_row(f"explained, {escape(kind)}", f"{value:.1%}", "")
        for kind, value in self.divergence.items():
            table.add_row(f"KL(mixture || LoRA) per {kind} token", f"{value:.4f} nats", "")
            table.add_row(f"loss per {kind} token: base, mixture, LoRA", _three(self.loss[kind]), "")
        for name, row in self.accuracy.items():
            table.add_row(f"accuracy of {name}", f"{row['accuracy']:.1%}", _interval(row["interval_95"]))
        for name, row in self.differences.items():
            table.add_row(
                f"{name} less mixture, same questions",
                f"{points(row['value'])} points",
                " to ".join(map(points, row["questions_95"])),
            )
        return table

    def __str__(self) -> str:
        lines = [f"{self.modules} linears, {self.exact} of them with one expert: exported exactly"]
        lines += [f"{kind}: {n['fitted']} rows fitted, {n['held_out']} held out" for kind, n in self.rows.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"written to {self.output}"])


def _three(values: Mapping[str, float]) -> str:
    return ", ".join(f"{values[name]:.3f}" for name in ("base", "mixture", "lora"))


def _interval(ends: Any) -> str:
    return f"{ends[0]:.1%} to {ends[1]:.1%}"

"""What a plain LoRA does in place of the mixture: what routing is worth in this adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

from mola.reporting.document import Table
from mola.reporting.formatting import NO_VALUE, interval, percent, points
from mola.reporting.load_run import Run

_MODELS = {"base": "base model", "mixture": "mixture", "lora": "LoRA"}


def worth_section(run: Run) -> dict[str, Any] | None:
    """The report of `mola convert --to lora` as tables; None if there is none."""
    export = run.export
    if export is None:
        return None
    tables = [_accuracies(export), _losses(export), _explained(export)]
    lora = export["differences"].get("lora")
    return {
        "export": export,
        "difference": None if lora is None else f"{points(lora['value'])} points, {_points(lora['questions_95'])}",
        "notes": export.get("notes", []),
        "tables": [table for table in tables if table.rows],
    }


def _accuracies(export: Mapping[str, Any]) -> Table:
    rows = []
    for name, row in export["accuracy"].items():
        less = export["differences"].get(name)
        difference = (points(less["value"]), _points(less["questions_95"])) if less else (NO_VALUE, NO_VALUE)
        rows.append((_MODELS.get(name, name), percent(row["accuracy"]), interval(row["interval_95"]), *difference))
    head = ("answers by", "accuracy", "95 % interval", "less the mixture, points", "95 % interval")
    return Table(head, rows, "Same questions")


def _points(bounds: Sequence[float]) -> str:
    return " to ".join(map(points, bounds))


def _losses(export: Mapping[str, Any]) -> Table:
    rows = [
        (kind, f"{value:.4f}", *(f"{export['loss'][kind][name]:.3f}" for name in _MODELS))
        for kind, value in export["divergence"].items()
        if kind in export["loss"]
    ]
    head = ("tokens of", "KL(mixture || LoRA)", *(f"loss of {name}" for name in _MODELS.values()))
    return Table(head, rows, "Nats per token")


def _explained(export: Mapping[str, Any]) -> Table:
    rows = [(kind, percent(value)) for kind, value in export["explained_by_kind"].items()]
    return Table(("linears", "explained"), rows, "Share of the mixture's squared update that the LoRA has")

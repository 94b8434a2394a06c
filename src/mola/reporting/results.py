"""What came out: accuracy and loss."""

from collections.abc import Mapping
from typing import Any

from mola.models.base_model import model_name
from mola.reporting.charts import Line, thinned, value_axis
from mola.reporting.commands import evaluate_command, has_answers
from mola.reporting.document import Table
from mola.reporting.formatting import MOST_ROWS, NO_VALUE, interval, number, percent, rows_said
from mola.reporting.load_run import Run

_LOOKS = {"before": "b", "after": "a"}
_MOST_GROUPS = 40  # in the chart; the table has all

Results = Mapping[str, Mapping[str, Any]]  # by `before` and `after`


def accuracy_section(run: Run) -> dict[str, Any]:
    """Accuracy before and after, over all samples and by group."""
    results = {name: result for name, result in (("before", run.before), ("after", run.after)) if result is not None}
    rows = _accuracy_rows(results) if results else []
    largest = sorted(range(1, len(rows)), key=lambda index: -rows[index]["total"])[:_MOST_GROUPS]
    asked = [result["settings"] for result in results.values()]
    values = {
        "data": {result.get("data_fingerprint") for result in results.values()},
        "scoring": {result["settings"].get("scoring") for result in results.values()},
        "base model": {model_name(str(each.get("base_model"))) for each in asked},
        "prompts": {prompt for result in results.values() if (prompt := _first_prompt(result)) is not None},
        "longest answer": {each.get("max_new_tokens") for each in asked if each.get("scoring") != "likelihood"},
    }
    needed = {"before": "without", "after": "with"}
    return {
        "results": results,
        "looks": _LOOKS,
        "rows": rows,
        "shown": [*rows[:1], *(rows[index] for index in sorted(largest))],
        "numbers": _accuracy_table(rows, results),
        "mistaken": [
            name for name, result in results.items() if bool(result["settings"].get("adapter")) != (name == "after")
        ],
        "different": [what for what, found in values.items() if len(found) > 1],
        "has_answers": bool(results) or has_answers(run),
        "missing": [(words, evaluate_command(run, name)) for name, words in needed.items() if name not in results],
    }


def _first_prompt(result: Mapping[str, Any]) -> str | None:
    """As asked: settings may leave the template to the task."""
    return next((each.get("prompt") for each in result.get("samples", [])), None)


def loss_section(run: Run) -> dict[str, Any]:
    """The loss curves."""
    if not run.curves:
        return {"lines": []}
    curves = {label: thinned(curve) for label, curve in run.curves.items()}
    lines = [
        Line(f"{label}, last {number(run.curves[label][-1][1])}", curve, "a" if label == "training" else "b")
        for label, (curve, _) in curves.items()
    ]
    by_step = [dict(curve) for curve in run.curves.values()]
    steps = sorted({step for curve in by_step for step in curve})
    rows = [(step, *(number(curve.get(step)) for curve in by_step)) for step in steps[-MOST_ROWS:]]
    head = ("step", *(f"{label} loss" for label in run.curves))
    return {
        "lines": lines,
        "axis": value_axis([value for line in lines for _, value in line.points], may_be_log=True),
        "together": [(label, together) for label, (_, together) in curves.items() if together > 1],
        "numbers": Table(head, rows, f"Loss by step{rows_said(len(steps))}"),
    }


def _accuracy_rows(results: Results) -> list[dict[str, Any]]:
    """All samples, then the groups in their order; `parts` of each are the results that have it."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {"all": dict(results)}
    for name, result in results.items():
        for column, values in result["groups"].items():
            for value, row in values.items():
                rows.setdefault(f"{column}: {value}", {})[name] = row
    return [
        {
            "label": label,
            "parts": parts,
            "total": max(part["total"] for part in parts.values()),
            "measured": [(_LOOKS[name], part["accuracy"], part["interval_95"]) for name, part in parts.items()],
        }
        for label, parts in rows.items()
    ]


def _accuracy_table(rows: list[dict[str, Any]], results: Results) -> Table:
    head = ["samples", "number", *(f"{part} {name}" for name in results for part in ("accuracy", "interval"))]
    lines = []
    for row in rows:
        line = [row["label"], row["total"]]
        for name in results:
            part = row["parts"].get(name)
            line += [percent(part["accuracy"]), interval(part["interval_95"])] if part else [NO_VALUE, NO_VALUE]
        lines.append(line)
    return Table(head, lines, "Accuracy by group")

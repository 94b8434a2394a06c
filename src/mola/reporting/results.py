"""Sections on what came out: accuracy and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mola.reporting.charts import Line, interval_strip, line_chart, thinned, value_axis
from mola.reporting.commands import evaluate_command, missing
from mola.reporting.formatting import MOST_ROWS, NO_VALUE, interval, number, percent, rows_said
from mola.reporting.load_run import Run
from mola.reporting.markup import Element, code, element, figure, folded, note, table

_LOOKS = {"before": "b", "after": "a"}
_MOST_GROUPS = 40  # in the chart; the table has all


def accuracy_section(run: Run) -> list[Element]:
    """Accuracy before and after, over all samples and by group."""
    results = {name: result for name, result in (("before", run.before), ("after", run.after)) if result is not None}
    content: list[Element] = []
    if results:
        rows = _accuracy_rows(results)
        strips = [_strip(label, parts) for label, parts in _chosen(rows)]
        axis = element("li", element("span"), _axis_below(), element("span"), class_="scale-row", aria_hidden="true")
        legend = [element("li", _dot(_LOOKS[name]), name) for name in results]
        cut = len(rows) - 1 - _MOST_GROUPS
        content += [
            figure(
                element("ul", strips, axis, class_="strips"),
                "Accuracy with 95 % interval",
                element("ul", legend, class_="legend"),
                note(f"{cut} smaller groups are in the table only.") if cut > 0 else None,
            ),
            folded("Numbers", _accuracy_table(rows, results)),
            *_remarks(results),
        ]
    for name, words in (("before", "without"), ("after", "with")):
        if name not in results:
            what = f"Accuracy {words} the adapter has not been measured."
            content.append(missing(what, evaluate_command(run, name)))
    return content


def loss_section(run: Run) -> list[Element]:
    """The loss curves."""
    if not run.curves:
        return [note("Nothing was logged: the run has no ", code("metrics.jsonl"), " with a loss.")]
    curves = {label: thinned(curve) for label, curve in run.curves.items()}
    axis = value_axis([value for curve, _ in curves.values() for _, value in curve], may_be_log=True)
    lines = [
        Line(f"{label}, last {number(run.curves[label][-1][1])}", curve, "a" if label == "training" else "b")
        for label, (curve, _) in curves.items()
    ]
    together = max(count for _, count in curves.values())
    scale = ", logarithmic" if axis.is_log else ""
    by_step, steps = {label: dict(curve) for label, curve in run.curves.items()}, _steps(run)
    rows = [(step, *(number(curve.get(step)) for curve in by_step.values())) for step in steps[-MOST_ROWS:]]
    chart = line_chart(lines, f"Loss by step: {'; '.join(line.name for line in lines)}", axis)
    return [
        figure(
            chart,
            f"Loss by step{scale}",
            note(f"A point is the mean of {together} entries of metrics.jsonl.") if together > 1 else None,
        ),
        folded(
            "Numbers",
            table(("step", *(f"{label} loss" for label in run.curves)), rows, f"Loss by step{rows_said(len(steps))}"),
        ),
    ]


def _accuracy_rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, Mapping[str, Any]]]]:
    """All samples, then the groups in their order; for each, the results that have it."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {"all": dict(results)}
    for name, result in results.items():
        for column, values in result["groups"].items():
            for value, row in values.items():
                rows.setdefault(f"{column}: {value}", {})[name] = row
    return list(rows.items())


def _chosen(rows: Sequence[tuple[str, dict[str, Mapping[str, Any]]]]) -> list[tuple[str, Any]]:
    """All samples and the largest groups, in the order of `rows`."""
    sizes = [max(row["total"] for row in parts.values()) for _, parts in rows]
    largest = sorted(range(1, len(rows)), key=lambda index: -sizes[index])[:_MOST_GROUPS]
    return [rows[0], *(rows[index] for index in sorted(largest))]


def _strip(label: str, parts: Mapping[str, Mapping[str, Any]]) -> Element:
    said = [f"{name} {percent(row['accuracy'])}, {interval(row['interval_95'])}" for name, row in parts.items()]
    measured = [(_LOOKS[name], row["accuracy"], row["interval_95"]) for name, row in parts.items()]
    values = " → ".join(percent(row["accuracy"], 0) for row in parts.values())
    strip = interval_strip(measured, f"{label}: {'; '.join(said)}")
    return element("li", element("span", label, class_="name"), strip, element("span", values, class_="value"))


def _axis_below() -> Element:
    ends = (("0%", "0 %", "start"), ("50%", "50 %", "middle"), ("100%", "100 %", "end"))
    texts = [element("text", text, x=x, y=12, text_anchor=anchor) for x, text, anchor in ends]
    return element("svg", texts, class_="strip-axis")


def _accuracy_table(rows: Any, results: Mapping[str, Mapping[str, Any]]) -> Element:
    head = ["samples", "number", *(f"{part} {name}" for name in results for part in ("accuracy", "interval"))]
    lines = []
    for label, parts in rows:
        cells: list[Any] = [label, max(row["total"] for row in parts.values())]
        for name in results:
            row = parts.get(name)
            cells += [percent(row["accuracy"]), interval(row["interval_95"])] if row else [NO_VALUE, NO_VALUE]
        lines.append(cells)
    return table(head, lines, "Accuracy by group")


def _remarks(results: Mapping[str, Mapping[str, Any]]) -> list[Element]:
    """How it was measured, and whether the two can be compared."""
    remarks = []
    for name, result in results.items():
        settings = result["settings"]
        scoring, unanswered = settings.get("scoring"), result.get("unanswered")
        text = f"{name.capitalize()}: {result['total']:,} samples, scoring {scoring}, {unanswered} unanswered"
        metrics = "".join(f", {key} {value:.3f}" for key, value in (result.get("metrics") or {}).items())
        remarks.append(f"{text}{metrics}.")
    found = [note(" ".join(remarks))]
    for what, values in (
        ("data", [result.get("data_fingerprint") for result in results.values()]),
        ("scoring", [result["settings"].get("scoring") for result in results.values()]),
    ):
        if len(set(values)) > 1:
            found.append(element("p", f"Before and after had different {what}: do not compare them.", class_="warning"))
    return found


def _steps(run: Run) -> list[int]:
    return sorted({step for curve in run.curves.values() for step, _ in curve})


def _dot(look: str) -> Element:
    dot = element("circle", cx="50%", cy="50%", r=4.5, class_=f"dot {look}")
    return element("svg", dot, class_="swatch", aria_hidden="true")

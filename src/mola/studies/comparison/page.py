"""The table of a comparison as one HTML file that needs nothing else, in the style of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mola.reporting.charts import interval_strip
from mola.reporting.document import Section, document
from mola.reporting.formatting import percent
from mola.reporting.markup import Element, element, figure, note, table
from mola.studies.comparison.summary import Row
from mola.studies.comparison.tables import COLUMNS, NOTE, by_budget, cells

_NO_INTERVAL = "With one seed there is no interval."


def page(rows: Sequence[Row], reference: str) -> str:
    """The whole file.

    Args:
        rows: see `mola.studies.comparison.summary.summarize`.
        reference: recipe that the others are compared with.
    """
    sections: list[Section] = [
        (f"task-{number}", task, _task(by_budget(list(members)), reference))
        for number, (task, members) in enumerate(groupby(rows, key=lambda row: row.task), start=1)
    ]
    told = [row for row in rows if row.difference is not None and row.difference.verdict != "not told apart"]
    compared = sum(row.difference is not None for row in rows)
    header = element(
        "header",
        element("p", "Comparison of mola", class_="kicker"),
        element("h1", "Recipes compared"),
        element("p", f"{len(told)} of {compared} differences to {reference} can be told apart.", class_="lead"),
        element("p", NOTE.format(reference=reference)),
    )
    return document("Recipes compared: mola", header, sections)


def _task(rows: Sequence[Row], reference: str) -> list[Element]:
    strips = [_strip(row, reference) for row in rows]
    has_interval = any(row.mean.interval_95 for row in rows)
    below = note(
        "Line: 95 % interval over seeds, on these questions. An open dot is the reference."
        if has_interval
        else _NO_INTERVAL
    )
    return [
        figure(element("ul", strips, class_="strips"), "Accuracy from 0 to 100 %", below),
        table(COLUMNS, [cells(row, reference) for row in rows], "Differences and what can be told apart"),
    ]


def _strip(row: Row, reference: str) -> Element:
    value = row.mean.value
    low, high = row.mean.interval_95 or (value, value)
    look = "b" if row.recipe == reference else "a"
    strip = interval_strip([(look, value, (max(low, 0.0), min(high, 1.0)))], f"{row.recipe}: {percent(value)}")
    name = element("span", row.recipe, class_="name")
    return element("li", name, strip, element("span", percent(value), class_="value"))

"""The table of a comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby

from mola.comparison.summary import Row
from mola.comparison.tables import COLUMNS, NOTE, by_budget, cells

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}
.box{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid color-mix(in srgb,currentColor 20%,transparent)}
th:first-child,td:last-child,th:last-child{text-align:left}
tr.new td,tr.new th{border-top:2px solid color-mix(in srgb,currentColor 45%,transparent)}
"""


def page(rows: Sequence[Row], reference: str) -> str:
    """The whole file.

    Args:
        rows: see `mola.comparison.summary.summarize`.
        reference: recipe that the others are compared with.
    """
    sections = []
    for task, members in groupby(rows, key=lambda row: row.task):
        sections.append(f"<h2>{html.escape(task)}</h2>{_table(list(members), reference)}")
    note = html.escape(NOTE.format(reference=reference))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mola compare</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>Recipes compared</h1><p>{note}</p>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _table(rows: Sequence[Row], reference: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in COLUMNS)
    body, group = [], None
    for row in by_budget(rows):
        first, *others = (html.escape(cell) for cell in cells(row, reference))
        mark = ' class="new"' if row.budget_group != group else ""
        group = row.budget_group
        body.append(f'<tr{mark}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    # A table wider than the page scrolls by itself, with the keyboard too.
    return f'<div class="box" tabindex="0">{table}</div>'

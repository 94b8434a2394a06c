"""Files that the tables and pictures of a comparison are written to."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import atomic_write_bytes, atomic_write_text, check_writable
from mola.files.marked_pages import check_page, has_markers, write_part
from mola.reporting.charts import Axis, Line
from mola.reporting.document import Section, Table, render
from mola.reporting.formatting import points
from mola.studies.comparison.contrasts import Contrast
from mola.studies.comparison.notes import CONTRAST_NOTE, note_of, power_line, search_note
from mola.studies.comparison.options import CompareOptions
from mola.studies.comparison.plots import NO_BAND, Curves, check_matplotlib, draw, has_band
from mola.studies.comparison.record import Result
from mola.studies.comparison.summary import AT_END, Row
from mola.studies.comparison.tables import (
    CONTRAST_COLUMNS,
    by_budget,
    cells,
    columns_of,
    comma_separated,
    contrast_tables,
    markdown,
    search_markdown,
    search_parts,
    steps_cell,
    title_of,
)
from mola.studies.comparison.tuning import Found, Power

logger = logging.getLogger(__name__)


def check_files(tables: str | None, plots: str | None, is_new: bool) -> None:
    """Refuse an ending that says no form, a file that cannot be written, and pictures without matplotlib.

    Files without markers that are there when a comparison begins (`is_new`) are not its own, and would be replaced.

    Raises:
        MolaError: as said.
    """
    for option, names, forms in (("tables", tables, _FORMS), ("plots", plots, _PICTURES)):
        for path in _paths(names):
            if path.suffix not in forms:
                raise MolaError(f"`{option}` must be files that end in {', '.join(forms)}: got {str(path)!r}.")
            check_writable(path)
            if path.suffix == ".md" and has_markers(path):
                check_page(path, option)
            elif is_new and path.exists():
                raise MolaError(
                    f"`{option}` must name files that are not there yet, or pages with two markers for the tables: "
                    f"{str(path)!r} is there, and would be replaced. Remove it, or pass another name."
                )
    if _paths(plots):
        check_matplotlib()


def _paths(names: str | None) -> list[Path]:
    return [Path(name.strip()) for name in (names or "").split(",") if name.strip()]


@dataclass(frozen=True)
class Outcome:
    """What a comparison has to say."""

    rows: Sequence[Row]
    reference: str
    found: Sequence[Found] = ()
    powers: Sequence[Power] = ()
    curves: Mapping[str, Curves] = field(default_factory=dict)  # by task, see `plots.bands`
    effort: str = ""  # see `effort_line`
    contrasts: Sequence[Contrast] = ()
    left: int = 0  # runs without a result

    def markdown(self) -> str:
        """The search, a table per task, and what all has cost."""
        text = search_markdown(self.found, self.powers) + markdown(self.rows, self.reference, self.contrasts)
        text = f"{self.state}\n\n{text}" if self.state else text
        return f"{text}\n{self.effort}\n" if self.effort else text

    @property
    def state(self) -> str:
        """That it is not complete; empty if it is."""
        return f"{self.left} runs are left: all numbers will change." if self.left else ""


def write_tables(tables: str | None, outcome: Outcome) -> None:
    """Write the tables in every form asked for; earlier ones are replaced.

    Of pages with markers it is the part between, and only when nothing is left: such a page is read as a result.
    """
    for path in _paths(tables):
        text = _FORMS[path.suffix](outcome)
        if path.suffix == ".md" and has_markers(path):
            if not outcome.left:
                write_part(path, text)
        else:
            atomic_write_text(path, text)


def write_plots(plots: str | None, options: CompareOptions, results: Sequence[Result], outcome: Outcome) -> None:
    """Draw every picture asked for, unless there is nothing to draw yet."""
    rows, names = outcome.rows, ([*(options.tasks or {})], [*(options.recipes or {})])
    if not any((row.difference and row.difference.joint_95) or row.measure != AT_END for row in rows):
        if plots:
            logger.warning(
                "`plots` %s is not written: no two recipes have two seeds in common, and there are no curves", plots
            )
        return
    for path in _paths(plots):
        picture = draw(results, rows, *names, path.suffix[1:], outcome.contrasts)
        atomic_write_bytes(path, picture)


def page(outcome: Outcome) -> str:
    """The tables as one HTML file that needs nothing else, in the style of a run's report.

    Curves: each recipe is drawn beside the reference.
    """
    reference = outcome.reference
    sections = [
        Section(f"task-{number}", title, _task(by_budget(list(members)), reference, outcome.curves), "comparison")
        for number, (title, members) in enumerate(groupby(outcome.rows, key=title_of), start=1)
    ]
    for number, (title, lines) in enumerate(contrast_tables(outcome.contrasts), start=1):
        data = {"differences": Table(CONTRAST_COLUMNS, lines, title), "note": CONTRAST_NOTE}
        sections.append(Section(f"contrasts-{number}", title, data, "contrasts"))
    tested = [(title_of(row), row.difference) for row in outcome.rows if row.difference and row.difference.joint_95]
    return render(
        "comparison.html",
        "Recipes compared: mola",
        sections,
        significant=sum(difference.verdict in ("better", "worse") for _, difference in tested),
        compared=len(tested),
        tables=len({title for title, _ in tested}),
        reference=reference,
        note=" ".join(filter(None, [outcome.state, note_of(outcome.rows, reference)])),
        searches=[Table(tuple(part.head), part.lines, part.title) for part in search_parts(outcome.found)],
        search_note=search_note(outcome.found) if outcome.found else "",
        powers=[power_line(each) for each in outcome.powers],
        effort=outcome.effort,
    )


def _task(rows: Sequence[Row], reference: str, curves: Mapping[str, Curves]) -> dict[str, Any]:
    strips, forest = [], []
    reach = max((_reach(row) for row in rows), default=0.0)
    for row in rows:
        low, high = row.mean.interval_95 or (row.mean.value, row.mean.value)
        look = "b" if row.recipe == reference else "a"
        shown = f"{points(row.mean.value, '')}\u00a0%"
        strips.append((row.recipe, shown, [(look, row.mean.value, (max(low, 0.0), min(high, 1.0)))]))
        if row.difference is not None and row.difference.joint_95 is not None and reach:
            value, low, high = (0.5 + each / (2 * reach) for each in (row.difference.value, *row.difference.joint_95))
            shown = f"{points(row.difference.value)} points"
            forest.append((row.recipe, shown, [("a", value, (low, high))]))
    lines = [cells(row, reference) + steps_cell(row) for row in rows]
    return {
        "strips": strips,
        "has_interval": any(row.mean.interval_95 for row in rows),
        "forest": forest,
        "reach": f"{100 * reach:.1f}",
        "curves": _beside_the_reference(curves.get(rows[0].task, {}), reference) if rows[0].measure != AT_END else [],
        "no_band": NO_BAND,
        "axis": Axis(0.0, 1.0),
        "differences": Table(columns_of(rows), lines, "Differences and their significance"),
    }


def _beside_the_reference(curves: Curves, reference: str) -> list[list[Line]]:
    """One chart for every recipe but the reference, which is in all of them; of the reference where it is alone."""
    lines = {
        name: Line(
            name,
            [(step, mean) for step, mean, *_ in points],
            "b" if name == reference else "a",
            band=[(step, low, high) for step, _, low, high in points] if has_band(points) else (),
        )
        for name, points in curves.items()
    }
    common = [lines[reference]] if reference in lines else []
    beside = [[*common, line] for name, line in lines.items() if name != reference]
    return beside if beside or not common else [common]


def _reach(row: Row) -> float:
    """How far from 0 the interval of a difference goes."""
    return max(map(abs, row.difference.joint_95)) if row.difference and row.difference.joint_95 else 0.0


_PICTURES = (".png", ".svg")
_FORMS: dict[str, Callable[[Outcome], str]] = {
    ".csv": lambda outcome: comma_separated(outcome.rows, outcome.contrasts),
    ".md": Outcome.markdown,
    ".html": page,
}

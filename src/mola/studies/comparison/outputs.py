"""Files that the table of a comparison is written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mola.errors import MolaError
from mola.files.atomic import atomic_write_text, check_writable
from mola.studies.comparison.page import page
from mola.studies.comparison.summary import Row
from mola.studies.comparison.tables import comma_separated, markdown

_FORMS: dict[str, Callable[[Sequence[Row], str], str]] = {
    ".csv": lambda rows, reference: comma_separated(rows),
    ".md": markdown,
    ".html": page,
}


def check_tables(tables: str | None) -> list[Path]:
    """Paths of the files asked for.

    Raises:
        MolaError: an ending that says no form, or a file that cannot be written.
    """
    paths = [Path(name.strip()) for name in (tables or "").split(",") if name.strip()]
    for path in paths:
        if path.suffix not in _FORMS:
            raise MolaError(f"`tables` must be files that end in {', '.join(_FORMS)}: got {str(path)!r}.")
        check_writable(path)
    return paths


def write_tables(tables: str | None, rows: Sequence[Row], reference: str) -> None:
    """Write the table in every form asked for; earlier ones are replaced."""
    for path in check_tables(tables):
        atomic_write_text(path, _FORMS[path.suffix](rows, reference))

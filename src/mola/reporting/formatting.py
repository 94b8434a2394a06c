"""Numbers as people read them, names of modules and layers."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

NO_VALUE = "–"
MOST_ROWS = 500  # of a table of numbers
_SET_OTHERWISE = frozenset("*\\<")
_SPACE = "\u00a0"  # a number and its unit stay in one line


def percent(value: float | None, digits: int = 1) -> str:
    """0.35 -> 35.0 %."""
    return NO_VALUE if _is_missing(value) else f"{100 * value:.{digits}f}{_SPACE}%"  # type: ignore[operator]


def points(value: float, sign: str = "+") -> str:
    """A share in points: 0.35 -> +35.0. A half goes away from zero, whatever floating point makes of it."""
    rounded = Decimal(str(round(100 * float(value), 6))).quantize(Decimal("0.1"), ROUND_HALF_UP)
    return f"{rounded + 0:{sign}}"  # no -0.0


def number(value: float | None) -> str:
    """A measured value with three significant digits."""
    if _is_missing(value):
        return NO_VALUE
    assert value is not None
    is_short = abs(value) < 999.5  # which `g` writes without an exponent
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if is_short else f"{value:,.0f}"


def interval(bounds: Sequence[float]) -> str:
    """Bounds of a confidence interval."""
    return f"{percent(bounds[0])} to {percent(bounds[1])}"


def duration(seconds: float) -> str:
    """Wall time."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g}{_SPACE}s"
    hours, minutes = divmod(whole // 60, 60)
    first, second = (f"{hours}{_SPACE}h", f"{minutes}{_SPACE}min") if hours else (f"{minutes}{_SPACE}min", None)
    return f"{first} {second or f'{whole % 60}{_SPACE}s'}"


def computers(descriptions: Iterable[Mapping[str, Any]]) -> str:
    """What `machine_description` said in each of several processes, every one once."""
    return "; ".join(sorted({_computer(each) for each in descriptions}))


def _computer(description: Mapping[str, Any]) -> str:
    count = description["threads"]
    parts = (description["cpu"], description["gpu"], f"{count} thread{'s' * (count != 1)}")
    return ", ".join(part for part in parts if part)


def layers(indices: Sequence[int | None]) -> str:
    """Neighbouring layers, lowest and highest."""
    first, last = layer_name(indices[0]), layer_name(indices[-1])
    return first if len(indices) == 1 else f"{first}–{last}"


def layer_name(index: int | None) -> str:
    """A layer, or that a module lies in none."""
    return NO_VALUE if index is None else str(index)


def layer_order(index: int | None) -> float:
    """For sorting: modules outside the layers come last."""
    return math.inf if index is None else index


def is_numeric(value: Any) -> bool:
    """Whether the text of a table's cell starts like a number."""
    return str(value).lstrip("+-−")[:1].isdigit()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; lists and mappings as JSON."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_markdown_cell(value) for value in line) + " |" for line in lines)


def _markdown_cell(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    text = " ".join(text.split()).replace("|", "\\|")
    # As a regular expression has them, they would be set otherwise, or lost.
    return f"`{text}`" if _SET_OTHERWISE.intersection(text.replace("\\|", "")) and "`" not in text else text


def rows_said(count: int) -> str:
    """What to add to the name of a table that may be too long to be shown in full."""
    return "" if count <= MOST_ROWS else f", the last {MOST_ROWS} of {count:,} rows"


def _is_missing(value: Any) -> bool:
    return value is None or value != value

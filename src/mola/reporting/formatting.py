"""Formats numbers, layers, machines and Markdown tables as text."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

NO_VALUE = "–"
MAX_ROWS = 500  # rows of a table of numbers
LOSS_NAMES = {"train_loss": "mean training loss", "eval_loss": "evaluation loss"}  # metrics of a run
_MARKDOWN_SYNTAX = frozenset("*\\<")
_SPACE = "\u00a0"  # keeps a number and its unit on one line


def percent(value: float | None, digits: int = 1) -> str:
    """0.35 -> 35.0 %."""
    return NO_VALUE if value is None or math.isnan(value) else f"{100 * value:.{digits}f}{_SPACE}%"


def points(value: float, sign: str = "+") -> str:
    """A share in percentage points: 0.35 -> +35.0. A half rounds away from zero."""
    rounded = Decimal(str(round(100 * float(value), 6))).quantize(Decimal("0.1"), ROUND_HALF_UP)
    return f"{rounded + 0:{sign}}"  # adding 0 turns -0.0 into 0.0


def nats(value: float, sign: str = "+") -> str:
    """A loss or a difference of losses with three decimals, and with a minus sign: -0.0123 -> −0.012."""
    return f"{round(value, 3) + 0:{sign}.3f}".replace("-", "−")  # adding 0 turns -0.0 into 0.0


def number(value: float | None) -> str:
    """A measured value with three significant digits; an integer with all of its digits."""
    if value is None or math.isnan(value):
        return NO_VALUE
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3g}" if abs(value) < 999.5 else f"{value:,.0f}"  # `g` writes larger values with an exponent


def format_interval(bounds: Sequence[float]) -> str:
    """A confidence interval as text, in percent."""
    return f"{percent(bounds[0])} to {percent(bounds[1])}"


def duration(seconds: float) -> str:
    """A wall time as text, in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g}{_SPACE}s"
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}{_SPACE}h {minutes}{_SPACE}min"
    return f"{minutes}{_SPACE}min {whole % 60}{_SPACE}s"


def machines_text(descriptions: Iterable[Mapping[str, Any]]) -> str:
    """The distinct machines of several processes as text; each description is from `machine_description`."""
    found = set()
    for machine in descriptions:
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
        found.add(", ".join(part for part in (machine["cpu"], machine["gpu"], threads) if part))
    return "; ".join(sorted(found))


def layer_range(indices: Sequence[int | None]) -> str:
    """Consecutive layers as text: the lowest and the highest."""
    first, last = layer_name(indices[0]), layer_name(indices[-1])
    return first if len(indices) == 1 else f"{first}–{last}"


def layer_name(index: int | None) -> str:
    """The number of a layer, or a dash for modules outside the layers."""
    return NO_VALUE if index is None else str(index)


def layer_order(index: int | None) -> float:
    """A sort key that puts modules outside the layers last."""
    return math.inf if index is None else index


def is_numeric(value: Any) -> bool:
    """Whether the text of a table's cell starts like a number."""
    return str(value).lstrip("+-−")[:1].isdigit()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; lists and mappings are written as JSON."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_markdown_cell(value) for value in line) + " |" for line in lines)


def _markdown_cell(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    text = " ".join(text.split()).replace("|", "\\|")
    # A regular expression holds characters that Markdown would interpret.
    needs_code = _MARKDOWN_SYNTAX.intersection(text.replace("\\|", "")) and "`" not in text
    return f"`{text}`" if needs_code else text


def rows_note(count: int) -> str:
    """The end of a caption for a table with `count` rows, of which only the last `MAX_ROWS` are shown; may be empty."""
    return "" if count <= MAX_ROWS else f", the last {MAX_ROWS} of {count:,} rows"

"""Tables of an allocation for the terminal: a row per layer, or per layer with a column per kind of linears."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.bar import Bar
from rich.markup import escape
from rich.table import Table

from mola.allocation.measured import Scores
from mola.allocation.numbers import ModuleExperts
from mola.architecture.layer_stacks import module_kinds

_BAR_WIDTH = 30


def _bar_of(value: int, most: int) -> Any:
    """Blocks, or what standard output can show."""
    if (sys.stdout.encoding or "").lower().startswith("utf"):
        return Bar(most, 0, value, width=_BAR_WIDTH)
    return "#" * round(_BAR_WIDTH * value / max(most, 1))


def layer_table(scores: Scores, num_experts: Sequence[int], title: str) -> Table:
    """Score and number of every layer."""
    table = Table(title=escape(title))
    for column in ("layer", "score", "experts"):
        table.add_column(column, justify="right")
    table.add_column("", width=_BAR_WIDTH)
    most = max(num_experts)
    for index, (score, experts) in enumerate(zip(scores, num_experts, strict=True)):
        bar = "not adapted" if score is None else _bar_of(experts, most)
        table.add_row(str(index), "-" if score is None else f"{score:.4g}", str(experts), bar)
    return table


def module_table(modules: Sequence[ModuleExperts], num_layers: int, title: str) -> Table:
    """Numbers of the linears, with the sums of each kind; from and to where a layer has several of a kind."""
    table = Table(title=escape(title))
    kinds = module_kinds(each.module for each in modules)
    cells: dict[tuple[int, str], list[int]] = defaultdict(list)
    sums: dict[str, int] = defaultdict(int)
    for each in modules:
        cells[each.layer_index, kinds[each.module]].append(each.num_experts)
        sums[kinds[each.module]] += each.num_experts
    for column in ("layer", *sums):
        table.add_column(escape(column), justify="right")
    for layer in range(num_layers):
        ends = [sorted({min(own), max(own)}) if (own := cells[layer, kind]) else ["-"] for kind in sums]
        table.add_row(str(layer), *("-".join(map(str, both)) for both in ends))
    table.add_section()
    table.add_row("total", *map(str, sums.values()), style="bold")
    return table

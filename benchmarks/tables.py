"""Results as tables: one for each suite, model, dtype and combination of the other fixed options."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table: its header, and the function that writes a row's cell."""

    header: str
    cell: Callable[[Row], str]


def _number(key: str, pattern: str = "{:,}") -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) is None else pattern.format(row[key])


def _spread(key: str, pattern: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if (value := row.get(key)) is None:
            return "-"
        low, middle, high = (pattern.format(value[name]) for name in ("p20", "median", "p80"))
        return f"{middle} ({low} to {high})"

    return cell


def _mebibytes(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) is None else f"{row[key] / 2**20:,.1f}"


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(key, "-"))


NAME = Column("provider", _text("provider"))
SIZE = [
    Column("rank", _number("rank")),
    Column("trainable", _number("trainable_parameters")),
]
FROZEN = Column("x frozen", _spread("ratio_to_frozen", "{:.3f}"))
LORA = Column("x lora_8", _spread("ratio_to_lora_8", "{:.3f}"))
SECONDS = [Column("seconds", _spread("seconds", "{:.3f}")), Column("on the clock", _spread("wall_seconds", "{:.3f}"))]

COLUMNS: dict[str, list[Column]] = {
    "step": [NAME, *SIZE, *SECONDS, Column("tokens per s", _number("tokens_per_second", "{:,.0f}")), FROZEN, LORA],
    "memory": [
        NAME,
        *SIZE,
        Column("peak MiB", _mebibytes("peak_bytes")),
        Column("above frozen", _mebibytes("peak_bytes_above_frozen")),
        Column("kept MiB", _mebibytes("saved_bytes")),
        Column("kept B/token/linear", _number("saved_bytes_per_token_and_linear", "{:,.0f}")),
        Column("each save counted", _number("saved_bytes_repeated_per_token_and_linear", "{:,.0f}")),
    ],
    "counts": [
        NAME,
        Column("operators forward", _number("forward_operators")),
        Column("backward", _number("backward_operators")),
        Column("per linear forward", _number("forward_operators_per_linear", "{:.1f}")),
        Column("backward", _number("backward_operators_per_linear", "{:.1f}")),
        Column("host syncs", _number("host_syncs")),
        Column("per linear", _number("host_syncs_per_linear", "{:.1f}")),
    ],
    "decode": [
        NAME,
        *SECONDS,
        Column("tokens per s", _number("tokens_per_second", "{:,.1f}")),
        Column("x base", _spread("ratio_to_base", "{:.3f}")),
        LORA,
        Column("graphs", _number("graphs")),
        Column("while measured", _number("graphs_while_measured")),
    ],
    "growth": [
        NAME,
        Column("experts", _number("num_experts")),
        Column("tokens", _number("tokens")),
        Column("seconds", _spread("seconds", "{:.4f}")),
        FROZEN,
        Column("overhead / lora_8's", _number("overhead_in_lora_8", "{:.2f}")),
    ],
    "curve": [
        NAME,
        Column("first loss", _number("first_loss", "{:.4f}")),
        Column("final loss", _number("final_loss", "{:.4f}")),
        Column("final - mola's", _number("final_difference", "{:+.5f}")),
        Column("step - mola's: mean", _number("mean_difference", "{:.1e}")),
        Column("largest", _number("max_difference", "{:.1e}")),
        Column("idle experts", _number("idle_experts", "{:.2%}")),
    ],
    "telemetry": [
        Column("dtype", _text("dtype")),
        Column("dropout", _text("dropout")),
        Column("routers", _number("routers")),
        Column("seconds without", _spread("off_seconds", "{:.3f}")),
        Column("with", _spread("on_seconds", "{:.3f}")),
        Column("with / without", _spread("on_over_off", "{:.4f}")),
        Column("a line", _spread("line_seconds", "{:.4f}")),
        Column("cost", _number("cost_percent", "{:.1f} %")),
    ],
    "logits": [
        Column("dtype", _text("dtype")),
        Column("dropout", _text("dropout")),
        Column("positions", _number("positions")),
        Column("needed", _number("needed_positions")),
        Column("seconds, all", _spread("all_seconds", "{:.3f}")),
        Column("needed", _spread("needed_seconds", "{:.3f}")),
        Column("needed / all", _spread("needed_over_all", "{:.3f}")),
    ],
    "attention": [
        Column("dtype", _text("dtype")),
        Column("dropout", _text("dropout")),
        Column("positions", _number("positions")),
        Column("seconds, sdpa", _spread("sdpa_seconds", "{:.3f}")),
        Column("eager", _spread("eager_seconds", "{:.3f}")),
        Column("eager / sdpa", _spread("eager_over_sdpa", "{:.3f}")),
    ],
    "redundancy": [
        Column("in", _number("features_in")),
        Column("out", _number("features_out")),
        Column("peak MiB, factors", _mebibytes("factors_peak_bytes")),
        Column("direct", _mebibytes("direct_peak_bytes")),
        Column("direct / factors", _number("direct_over_factors", "{:,.0f}")),
        Column("seconds, factors", _number("factors_cpu_seconds", "{:.3f}")),
        Column("direct", _number("direct_cpu_seconds", "{:.3f}")),
        Column("largest difference", _number("largest_relative_difference", "{:.1e}")),
    ],
}
# Values that are the same in all rows of a table, so the table's title names them.
FIXED = {
    "step": ("model", "dtype", "dropout", "batch_size", "seq_len", "num_experts", "optimizer"),
    "memory": ("model", "dtype", "dropout", "batch_size", "seq_len", "num_experts", "optimizer"),
    "counts": ("model", "dtype", "dropout", "num_experts"),
    "decode": ("model", "dtype", "mode", "batch_size", "num_experts", "new_tokens"),
    "growth": ("model", "num_layers", "dtype", "dropout", "over"),
    "curve": ("model", "dtype", "dropout", "batch_size", "seq_len", "num_experts", "steps"),
    "telemetry": ("model", "batch_size", "seq_len", "num_experts", "optimizer"),
    "logits": ("model", "batch_size", "num_experts", "optimizer"),
    "attention": ("model", "batch_size", "num_experts", "optimizer"),
    "redundancy": ("num_experts", "r"),
}


def tables(suite: str, rows: Sequence[Row]) -> Iterator[Table]:
    """Tables of a suite's rows, which come in the order they were measured in."""

    def fixed(row: Row) -> list[Any]:
        return [row[name] for name in FIXED[suite]]

    for values, members in itertools.groupby(rows, key=fixed):
        said = ", ".join(f"{name} {value}" for name, value in zip(FIXED[suite], values, strict=True))
        table = Table(title=f"{suite}: {said}", title_justify="left")
        for column in COLUMNS[suite]:
            table.add_column(column.header, justify="left" if column is NAME else "right")
        for row in members:
            table.add_row(*(column.cell(row) for column in COLUMNS[suite]))
        yield table

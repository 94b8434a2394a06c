"""`python -m benchmarks.effective_experts_page`: tables and a picture from records of `benchmarks.effective_experts`.

    python -m benchmarks.effective_experts_page seen.json more.json --picture seen.svg > seen.md

The tables are Markdown on standard output. The records must have the same base model, data and batches. The first LoRA
among the adapters is the one that the norms of all updates are compared with.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.errors import in_one_line
from benchmarks.plot import to_svg
from mola.errors import MolaError
from mola.files.atomic import atomic_write_text, check_new_file
from mola.files.reading import first_repeated, read_json
from mola.options.fields import check_required, find_difference, option
from mola.options.parsing import parse
from mola.reporting.formatting import (
    NO_VALUE,
    layer_name,
    layer_order,
    machines_text,
    markdown_table,
    number,
    percent,
)

_ALIKE = ("format", "base_model", "data", "samples", "tokens", "batch_size", "first_gate", "dtype")
_COLUMNS = (
    *("effective experts", "10 to 90 % of tokens", "first gate above", "rank seen", "10 to 90 % of tokens"),
    *("largest possible", "rank of the mean update", "update / output", "update / LoRA's"),
    *("experts by gradient", "experts over training"),
)
_WORDS = """\
Means over linears. A token's `effective experts` are 1 / sum of its squared gates. `first gate above`: share of
tokens whose largest gate is above {first_gate:g}. `rank seen`: effective rank of the update that a token sees, (sum
s^2)^2 / sum s^4 over its singular values s; `largest possible` is `top_k * r`. The `mean update` is that of all
tokens. `update / output`: norm of the update's output over the norm of the frozen linear's output. `update / LoRA's`:
norm of the update's output over {reference}. `experts by gradient`: 1 / sum of the squared shares of the gradient's
norm; `experts over training`: the same of the mean gates over the whole training."""
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")  # of Okabe and Ito
_MARKERS = "osD^vPX"

Row = Mapping[str, Any]
Adapter = Mapping[str, Any]


@dataclass
class PageOptions:
    """Options of the page."""

    records: list[str] = option(None, "Records of `python -m benchmarks.effective_experts`.", required=True)
    picture: str | None = option(None, "SVG file to write.")
    overwrite: bool = option(False, "Replace an existing picture.")

    def __post_init__(self) -> None:
        check_required(self)


def read(paths: Sequence[str]) -> dict[str, Any]:
    """The records as one.

    Raises:
        MolaError: they are of different data or settings, or two adapters have one name.
    """
    records = [read_json(Path(path)) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if (name := find_difference(records[0], record, _ALIKE)) is not None:
            raise MolaError(f"`records` must have the same `{name}`: {paths[0]!r} and {path!r} differ.")
    adapters = [adapter for record in records for adapter in record["adapters"]]
    if (repeated := first_repeated(adapter["name"] for adapter in adapters)) is not None:
        raise MolaError(f"`records` hold two adapters named {repeated!r}. Measure one of them under another name.")
    machines = [record["machine"] for record in records]
    return {**records[0], "adapters": adapters, "machines": machines}


# ---------------------------------------------------------------------- tables


def page(record: Mapping[str, Any]) -> str:
    """All tables in Markdown."""
    adapters = record["adapters"]
    lora = next((each for each in adapters if is_lora(each)), None)
    reference = f"that of `{lora['name']}`" if lora else "LoRA's, which is not among the adapters"
    facts = (
        f"{record['samples']} samples, {record['tokens']:,} tokens; base model {record['base_model']}, dtype "
        f"{record['dtype']}; gradients of batches of {record['batch_size']}. {machines_text(record['machines'])}."
    )
    whole = []
    for each in adapters:
        linears = each["linears"]
        facts_of = [each["name"], number(each["trained_values"]), _experts(linears), number(each["loss"])]
        whole.append([*facts_of, *cells(linears, lora)])
    header = ("adapter", "trained values", "experts", "loss", *_COLUMNS)
    parts = [
        facts,
        textwrap.fill(_WORDS.format(first_gate=record["first_gate"], reference=reference), 120),
        markdown_table(header, whole),
    ]
    for adapter in adapters:
        for title, groups in (("layer", by_layer(adapter)), ("linear", by_linear(adapter))):
            rows = [[name, _experts(members), *cells(members, lora)] for name, members in groups.items()]
            parts += [f"## {adapter['name']}, by {title}", markdown_table((title, "experts", *_COLUMNS), rows)]
    return "\n\n".join(parts)


def is_lora(adapter: Adapter) -> bool:
    """Whether every linear has one expert."""
    return all(row["num_experts"] == 1 for row in adapter["linears"])


def by_layer(adapter: Adapter) -> dict[str, list[Row]]:
    """Number of a layer -> its linears, lowest layer first; a dash stands for those outside the layers."""
    rows = sorted(adapter["linears"], key=lambda row: layer_order(row["layer_index"]))
    return _grouped(rows, lambda row: layer_name(row["layer_index"]))


def by_linear(adapter: Adapter) -> dict[str, list[Row]]:
    """Kind of a linear, such as `q_proj` -> these linears of all layers."""
    return _grouped(adapter["linears"], lambda row: row["linear"])


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _experts(rows: Sequence[Row]) -> str:
    counts = sorted({row["num_experts"] for row in rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def cells(rows: Sequence[Row], lora: Adapter | None) -> list[str]:
    """Means over linears, one cell for each of `_COLUMNS`."""
    return [
        number(mean(rows, "effective_experts", "mean")),
        _range(rows, "effective_experts"),
        percent(mean(rows, "first_gate_above")),
        number(mean(rows, "effective_rank", "mean")),
        _range(rows, "effective_rank"),
        number(fmean(row["top_k"] * row["r"] for row in rows)),
        number(mean(rows, "mean_update_rank")),
        percent(mean(rows, "relative_norm", "mean")),
        number(norm_over(rows, lora)),
        number(mean(rows, "gradient", "effective_experts")),
        number(experts_over_training(rows)),
    ]


def _range(rows: Sequence[Row], key: str) -> str:
    low, high = (number(mean(rows, key, level)) for level in ("p10", "p90"))
    return f"{low} to {high}"


def mean(rows: Sequence[Row], *keys: str) -> float | None:
    """Mean over the linears that have a value; None if none has."""
    found = []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value[key]
        if value is not None:
            found.append(value)
    return fmean(found) if found else None


def norm_over(rows: Sequence[Row], lora: Adapter | None) -> float | None:
    """Mean norm of the update's output over that of a LoRA, mean over the linears that both adapt; None without any."""
    theirs = {row["module"]: row["update_norm"]["mean"] for row in lora["linears"]} if lora else {}
    ratios = [row["update_norm"]["mean"] / theirs[row["module"]] for row in rows if theirs.get(row["module"])]
    return fmean(ratios) if ratios else None


def experts_over_training(rows: Sequence[Row]) -> float | None:
    """`1 / sum_e m_e^2` of the mean gates over the training, mean over linears with telemetry; None without any."""
    found = [1 / sum(gate**2 for gate in row["training_gates"]) for row in rows if row["training_gates"]]
    return fmean(found) if found else None


# ---------------------------------------------------------------------- picture


def draw(record: Mapping[str, Any]) -> Any:
    """The picture, as a `matplotlib.figure.Figure`: four measures by layer, with a band from 10 to 90 % of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    experts, ranks, norms, gradients = figure.subplots(2, 2).flat
    for place, adapter in enumerate(record["adapters"]):
        layers = [rows for name, rows in by_layer(adapter).items() if name != NO_VALUE]
        style = {"color": _COLORS[place % len(_COLORS)], "marker": _MARKERS[place % len(_MARKERS)], "markersize": 3.5}
        x = [rows[0]["layer_index"] for rows in layers]
        for axes, key in ((experts, "effective_experts"), (ranks, "effective_rank"), (norms, "relative_norm")):
            low, middle, high = ([mean(rows, key, part) for rows in layers] for part in ("p10", "mean", "p90"))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(x, middle, label=adapter["name"], **style)
        ranks.plot(x, [mean(rows, "mean_update_rank") for rows in layers], color=style["color"], linestyle="--")
        shares = [mean(rows, "gradient", "effective_experts") for rows in layers]
        gradients.plot(x, [float("nan") if share is None else share for share in shares], **style)
    titles = {
        experts: "effective experts of a token",
        ranks: "effective rank seen (dashed: of the mean update)",
        norms: "norm of the update over that of the frozen output",
        gradients: "effective experts by shares of the gradient",
    }
    for axes, title in titles.items():
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    handles, labels = experts.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5))
    caption = (
        f"Means over the linears of a layer; bands from 10 to 90 % of {record['tokens']:,} tokens. "
        f"{record['base_model']}, {record['samples']} samples."
    )
    figure.supxlabel(caption, fontsize=7, x=0.01, ha="left")
    return figure


@in_one_line("effective_experts_page")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and draw the picture; 0, or 2 for wrong input."""
    words = sys.argv[1:] if arguments is None else arguments
    summary = str(__doc__).partition("\n")[0]
    options = parse(PageOptions, words, prog="benchmarks.effective_experts_page", summary=summary, positional="records")
    record = read(options.records)
    if options.picture is not None:
        picture = check_new_file("picture", options.picture, options.overwrite)
        atomic_write_text(picture, to_svg(lambda: draw(record), "What a token sees of a mixture, by layer"))
    print(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

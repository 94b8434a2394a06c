"""Heat maps as tables: a column per layer, a row per expert, and in each cell a number, shaded by its size."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mola.architecture.layer_names import module_kinds
from mola.reporting.charts import shade
from mola.reporting.formatting import NO_VALUE, layer_name, layer_order, percent

_MAX_CELLS = 30_000  # cells of all maps together, which take less than a megabyte
_MAX_VIEWS = 24  # views to choose from
_LABELS = {
    "all": "all tokens",
    "prompt": "prompt",
    "answer": "answer",
    "token=word": "words",
    "token=number": "numbers",
    "token=punctuation": "punctuation",
    "token=space": "spaces",
    "token=special": "special tokens",
}

Usage = Sequence[Mapping[str, Any]]  # use of the experts of each module, as `mola inspect` writes it


class Cell(NamedTuple):
    """Text of a cell, its class in the style sheet, and its tooltip."""

    text: object = ""
    css_class: str = ""
    title: str = ""


Row = tuple[object, Sequence[Cell]]  # name and cells


class HeatMap(NamedTuple):
    """A table of shaded cells; each row has a name. The row `last`, if there is one, is set apart."""

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]
    last: Row | None = None


@dataclass(frozen=True)
class Choice:
    """A group of radio buttons: its key and legend, and the name of each button."""

    key: str
    legend: str
    names: Sequence[str]


@dataclass(frozen=True)
class GateMaps:
    """Mean gates of all experts. Buttons choose a map; a browser without support for them shows all maps."""

    choices: tuple[Choice, Choice]  # of kinds of modules and of groups of tokens
    views: Sequence[Sequence[tuple[int, HeatMap]]]  # for each group of tokens its maps, with their kind of module
    largest: float  # the largest gate
    num_left_out: int  # number of groups of tokens without a map


def gate_maps(usage: Mapping[str, Usage]) -> GateMaps:
    """One map for each kind of module and each group of tokens; `usage` has the modules by group of tokens."""
    shown = _shown_groups(usage)
    largest = max(max(row["mean_gates"]) for name in shown for row in usage[name])
    # Kinds of the modules of all views: a module that sees only some tokens is not in every view.
    kind_of = module_kinds(dict.fromkeys(row["module"] for name in shown for row in usage[name]))
    kinds = list(dict.fromkeys(kind_of.values()))
    views = [
        [
            (kinds.index(kind), _gate_map(rows, largest, f"{kind}, {_label(name)}"))
            for kind, rows in _by_kind(usage[name], kind_of).items()
        ]
        for name in shown
    ]
    choices = Choice("kind", "Module", kinds), Choice("view", "Tokens", [_label(name) for name in shown])
    return GateMaps(choices, views, largest, len(usage) - len(shown))


def _shown_groups(usage: Mapping[str, Usage]) -> list[str]:
    """The groups that get maps: parts of the text and types of token, then the largest groups of samples."""
    first = [name for name in _LABELS if name in usage] or list(usage)[:1]
    groups = sorted(set(usage) - set(first), key=lambda name: (-usage[name][0]["num_tokens"], name))
    cells = sum(len(row["mean_gates"]) for row in usage[first[0]])
    return [*first, *groups][: max(1, min(_MAX_VIEWS, _MAX_CELLS // cells))]


def _label(name: str) -> str:
    return _LABELS.get(name) or name.replace("=", ": ", 1)


def _by_kind(rows: Usage, kinds: Mapping[str, str]) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[kinds[row["module"]]].append(row)
    return {kind: sorted(members, key=lambda row: layer_order(row["layer_index"])) for kind, members in grouped.items()}


def _gate_map(rows: Usage, largest: float, what: str) -> HeatMap:
    num_experts = max(len(row["mean_gates"]) for row in rows)
    body = [(expert, [_gate_cell(row, expert, largest) for row in rows]) for expert in range(num_experts)]
    balance = "balance", [Cell(f"{row['balance']:.2f}".removeprefix("0")) for row in rows]
    columns = [layer_name(row["layer_index"]) for row in rows]
    return HeatMap(f"Mean gate, per cent: {what}", "expert / layer", columns, body, balance)


def _gate_cell(row: Mapping[str, Any], expert: int, largest: float) -> Cell:
    gates = row["mean_gates"]
    if expert >= len(gates):
        return Cell()
    if expert in row["dead_experts"]:
        return Cell("×")
    return Cell(f"{100 * gates[expert]:.0f}", shade(gates[expert], largest))


def answer_map(experts: Usage) -> HeatMap:
    """For each module, the expert whose mean gate over one expected answer is largest, shaded by that gate."""
    layers = sorted({row["layer_index"] for row in experts}, key=layer_order)
    rows = []
    for kind, members in _by_kind(experts, module_kinds(row["module"] for row in experts)).items():
        by_layer = {row["layer_index"]: row["mean_gates"] for row in members}
        rows.append((kind, [_strongest_cell(by_layer.get(layer)) for layer in layers]))
    caption = "Strongest expert over the expected answer by module and layer; a stronger shade is a higher mean gate"
    return HeatMap(caption, "module / layer", [layer_name(layer) for layer in layers], rows)


def _strongest_cell(gates: Sequence[float] | None) -> Cell:
    if gates is None:
        return Cell(NO_VALUE)
    gate = max(gates)
    return Cell(list(gates).index(gate), shade(gate), percent(gate, 0))


def change_map(rows: Sequence[tuple[int | None, int, float]], what: str) -> HeatMap:
    """Changes by layer and expert, shaded by their size, with their sign.

    Each of `rows` has a layer, an expert and a change of `what`. Changes are shown in units of a power of ten, chosen
    so that the largest change has two digits.
    """
    largest = max(abs(change) for _, _, change in rows)
    unit = 10.0 ** math.ceil(math.log10(largest / 99)) if largest else 1.0
    layers = sorted({layer for layer, _, _ in rows}, key=layer_order)
    cells = {}
    for layer, expert, change in rows:
        css_class = shade(abs(change), largest) + (" down" if change < 0 else "")
        cells[layer, expert] = Cell(_signed(round(change / unit)), css_class)
    experts = sorted({expert for _, expert, _ in rows})
    body = [(expert, [cells.get((layer, expert), Cell()) for layer in layers]) for expert in experts]
    return HeatMap(f"{what}; 1 stands for {unit:g}", "expert / layer", [layer_name(layer) for layer in layers], body)


def _signed(units: int) -> str:
    return f"{units:+d}".replace("-", "−") if units else "0"

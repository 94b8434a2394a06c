"""Heat maps as tables: layers side by side, experts below each other, every cell a number on a shade of it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mola.reporting.charts import scale, shade
from mola.reporting.formatting import NO_VALUE, kinds_of, layer_name, layer_order, percent
from mola.reporting.markup import Element, element, note, scrolling

_MOST_CELLS = 30_000  # of all maps together: less than a megabyte
_MOST_VIEWS = 24  # buttons to choose from
_WHOLE = ("all", "prompt", "answer")
_NAMES = {
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


@dataclass(frozen=True)
class Choice:
    """Radio buttons: what they are for, and the name of each."""

    key: str
    legend: str
    names: Sequence[str]


def gate_maps(usage: Mapping[str, Usage]) -> tuple[Element, list[Choice]]:
    """Mean gates of all experts, one map for each kind of module and each kind of token, and buttons to choose.

    Without style sheets, or in a browser that can not choose, all maps are there.

    Args:
        usage: kind of token -> the modules.

    Returns:
        The maps, and the choices that `choice_rules` makes work.
    """
    shown = _shown(usage)
    most = max(max(row["mean_gates"]) for name in shown for row in usage[name])
    kinds: list[str] = []
    views = []
    for index, name in enumerate(shown):
        by_kind = _by_kind(usage[name])
        kinds = kinds or list(by_kind)
        maps = [
            element("div", _map(rows, most, f"{kind}, {_label(name)}"), class_=f"map kind-{kinds.index(kind)}")
            for kind, rows in by_kind.items()
            if kind in kinds
        ]
        views.append(element("div", maps, class_=f"view view-{index}"))
    choices = [Choice("kind", "Module", kinds), Choice("view", "Tokens", [_label(name) for name in shown])]
    left_out = len(usage) - len(shown)
    text = f"{left_out} smaller groups are left out here; the result of mola inspect has them."
    remark = note(text) if left_out else None
    buttons = element("div", [_buttons(choice) for choice in choices if len(choice.names) > 1], class_="choices")
    key = scale(percent(most, 0), ". × no token chose this expert.")
    return element("div", buttons, views, key, remark, class_="maps"), choices


def choice_rules(choices: Sequence[Choice]) -> str:
    """Style rules: of each choice, what is chosen is shown and the rest is not."""
    rules = []
    for choice in choices:
        for index in range(len(choice.names)):
            chosen = f":has(#{choice.key}-{index}:checked)" if len(choice.names) > 1 else ""
            rules.append(f".maps{chosen} .{choice.key}-{index}{{display:block}}")
    return "@supports selector(:has(*)){" + "".join(rules) + "}"


def answer_map(experts: Usage) -> Element:
    """Which expert of each module weighed most for one answer, shaded by its mean gate."""
    by_kind = _by_kind(experts)
    layers = sorted({row["layer_index"] for row in experts}, key=layer_order)
    body = []
    for kind, rows in by_kind.items():
        by_layer = {row["layer_index"]: row["mean_gates"] for row in rows}
        cells = [_top_cell(by_layer.get(layer)) for layer in layers]
        body.append(element("tr", element("th", kind, scope="row"), cells))
    return _heat_table("module", [layer_name(layer) for layer in layers], body, "Strongest expert by module and layer")


def change_map(rows: Sequence[tuple[int | None, int, float]], what: str) -> Element:
    """Changes by layer and expert, in units that leave two digits, shaded by their size; the sign is written.

    Args:
        rows: layer, expert, change.
        what: they are changes of.
    """
    most = max(abs(change) for _, _, change in rows)
    unit = 10.0 ** math.ceil(math.log10(most / 99)) if most else 1.0
    layers = sorted({layer for layer, _, _ in rows}, key=layer_order)
    by_place = {(layer, expert): change for layer, expert, change in rows}
    body = []
    for expert in sorted({expert for _, expert, _ in rows}):
        cells = []
        for layer in layers:
            change = by_place.get((layer, expert))
            if change is None:
                cells.append(element("td"))
            else:
                look = shade(abs(change), most) + (" down" if change < 0 else "")
                cells.append(element("td", f"{round(change / unit):+d}".replace("-", "−"), class_=look))
        body.append(element("tr", element("th", expert, scope="row"), cells))
    return _heat_table("expert", [layer_name(layer) for layer in layers], body, f"{what}; 1 stands for {unit:g}")


def _shown(usage: Mapping[str, Usage]) -> list[str]:
    """Names of the uses that get maps: all parts of the text and kinds of token, then the largest groups."""
    first = [name for name in (*_WHOLE, *_NAMES) if name in usage]
    first = list(dict.fromkeys(first)) or list(usage)[:1]
    groups = sorted(set(usage) - set(first), key=lambda name: (-usage[name][0]["num_tokens"], name))
    cells = sum(len(row["mean_gates"]) for row in usage[first[0]])
    return [*first, *groups][: max(1, min(_MOST_VIEWS, _MOST_CELLS // cells))]


def _label(name: str) -> str:
    return _NAMES.get(name) or name.replace("=", ": ", 1)


def _by_kind(rows: Usage) -> dict[str, list[Mapping[str, Any]]]:
    kinds = kinds_of(row["module"] for row in rows)
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[kinds[row["module"]]].append(row)
    return {kind: sorted(members, key=lambda row: layer_order(row["layer_index"])) for kind, members in grouped.items()}


def _map(rows: Usage, most: float, caption: str) -> Element:
    width = max(len(row["mean_gates"]) for row in rows)
    body = [
        element("tr", element("th", expert, scope="row"), [_gate_cell(row, expert, most) for row in rows])
        for expert in range(width)
    ]
    balances = [element("td", f"{row['balance']:.2f}".removeprefix("0")) for row in rows]
    body.append(element("tr", element("th", "balance", scope="row"), balances, class_="sum"))
    return _heat_table(
        "expert", [layer_name(row["layer_index"]) for row in rows], body, f"Mean gate, per cent: {caption}"
    )


def _gate_cell(row: Mapping[str, Any], expert: int, most: float) -> Element:
    gates = row["mean_gates"]
    if expert >= len(gates):
        return element("td")
    if expert in row["dead_experts"]:
        return element("td", "×")
    return element("td", f"{100 * gates[expert]:.0f}", class_=shade(gates[expert], most))


def _top_cell(gates: Sequence[float] | None) -> Element:
    if gates is None:
        return element("td", NO_VALUE)
    gate = max(gates)
    return element("td", list(gates).index(gate), class_=shade(gate), title=percent(gate, 0))


def _heat_table(corner: str, columns: Sequence[str], body: Sequence[Element], caption: str) -> Element:
    # Modules of several kinds in one layer would repeat a name: that is what a title is for, not a number.
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    head = [element("th", name, scope="col") for name in columns]
    corner_cell = element("th", corner, element("span", " / layer"), scope="col")
    inner = element(
        "table",
        element("caption", caption, "; several modules of one layer in a row" if repeated else None),
        element("thead", element("tr", corner_cell, head)),
        element("tbody", list(body)),
        class_="heat",
    )
    return scrolling(inner, caption)


def _buttons(choice: Choice) -> Element:
    labels = [
        element(
            "label",
            element("input", type="radio", name=choice.key, id=f"{choice.key}-{index}", checked=index == 0),
            element("span", name),
        )
        for index, name in enumerate(choice.names)
    ]
    return element("fieldset", element("legend", choice.legend), element("div", labels))

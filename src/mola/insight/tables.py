"""Gates as HTML tables with shaded cells, which need no script and no style sheet."""

import html
from collections.abc import Sequence

from mola.insight.recorder import ModuleGates

# A share of the page's text colour is legible on light and on dark pages.
_CELL = "padding:2px 8px;text-align:right;background:color-mix(in srgb,currentColor {shade}%,transparent)"
_MAX_SHADE = 45  # per cent; the number stays legible on this shade


def layers_table(modules: Sequence[ModuleGates], tokens: slice) -> str:
    """Mean gate of each expert over some tokens in per cent, with one row per layer, for modules of one kind."""
    width = max((module.gates.shape[1] for module in modules), default=0)
    head = _row("th", ["layer", *(f"expert {expert}" for expert in range(width))])
    rows = []
    for module in modules:
        counted = module.gates[tokens]
        mean = counted.mean(0).tolist() if len(counted) else [0.0] * module.gates.shape[1]
        cells = [_cell(value) for value in mean] + ["<td></td>"] * (width - len(mean))
        layer = module.module if module.layer_index is None else str(module.layer_index)
        rows.append(f'<tr><th scope="row">{html.escape(layer)}</th>{"".join(cells)}</tr>')
    return _table("Mean gate of each expert, by layer, per cent", head, rows)


def tokens_table(module: ModuleGates, tokens: Sequence[str], shown: slice) -> str:
    """Gates of one module in per cent, with one row for each of the shown tokens."""
    head = _row("th", ["token", *(f"expert {expert}" for expert in range(module.gates.shape[1]))])
    rows = []
    for text, gates in zip(tokens[shown], module.gates[shown], strict=True):
        name = f'<th scope="row" style="text-align:left"><code>{html.escape(text)}</code></th>'
        rows.append(f"<tr>{name}{''.join(_cell(gate) for gate in gates.tolist())}</tr>")
    return _table(f"Gates of {module.module}, by token, per cent", head, rows)


def _cell(gate: float) -> str:
    if gate == 0:
        return '<td style="padding:2px 8px;text-align:right">·</td>'
    style = _CELL.format(shade=round(_MAX_SHADE * gate))
    return f'<td style="{style}">{100 * gate:.0f}</td>'


def _row(kind: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{kind} scope="col">{html.escape(text)}</{kind}>' for text in texts) + "</tr>"


def _table(caption: str, head: str, rows: Sequence[str]) -> str:
    caption = f'<caption style="text-align:left">{html.escape(caption)}</caption>'
    table = f"<table>{caption}<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    # A table wider than the screen scrolls sideways, also by keyboard.
    return f'<div style="overflow-x:auto" tabindex="0">{table}</div>'

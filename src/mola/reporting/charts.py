"""Charts as inline SVG that takes its colours from the page.

Places are in per cent of the drawing and type is in pixels of the screen, so a chart that becomes narrower stays
legible. Labels of the axes lie outside of the drawing: the style sheet leaves the space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mola.reporting.markup import Element, element

Points = Sequence[tuple[float, float]]

SHADES = 20  # steps of a heat map's scale; the style sheet has one class for each
_LOG_FROM = 10.0  # largest over smallest value that a linear axis shows well


@dataclass(frozen=True)
class Axis:
    """From values to places between 0 and 1.

    Attributes:
        low: value at 0.
        high: value at 1.
        is_log: whether equal ratios, not equal differences, have equal lengths.
    """

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Place of a value."""
        if self.high == self.low:
            return 0.5
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the axis, about `count` of them."""
        if self.high == self.low:
            return [self.low]
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            values = [digit * 10.0**decade for decade in decades for digit in steps]
        else:
            rough = (self.high - self.low) / count
            size = 10.0 ** math.floor(math.log10(rough))
            step = min((factor * size for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
            first = math.ceil(self.low / step - 1e-9)
            values = [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [value for value in values if -1e-9 <= self.at(value) <= 1 + 1e-9]


def value_axis(values: Sequence[float], *, may_be_log: bool = False) -> Axis:
    """An axis for measured values that holds 0, or a logarithmic one where they differ by orders of magnitude."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= _LOG_FROM:
        return Axis(low / 1.15, high * 1.15, True)
    return Axis(min(low * 1.05, 0.0), max(high * 1.05, 0.0) or 1.0)


@dataclass(frozen=True)
class Line:
    """One curve: its name, its points, and how it looks (`a`, `b` or `c` of the style sheet)."""

    name: str
    points: Points
    look: str


def line_chart(lines: Sequence[Line], label: str, y: Axis, x_name: str = "step") -> list[Element]:
    """Curves over a common horizontal axis, and the legend if there are several.

    Args:
        lines: with at least one point each.
        label: what the chart says, for those who do not see it.
        y: vertical axis.
        x_name: name of the horizontal axis.
    """
    every_x = [place for line in lines for place, _ in line.points]
    x = Axis(min(every_x), max(every_x))
    curves = [element("polyline", points=_path(line.points, x, y), class_=f"line {line.look}") for line in lines]
    inner = element("svg", curves, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")
    dots = [
        _with_title(
            element("circle", cx=_share(x.at(place)), cy=_share(1 - y.at(value)), r=3, class_=f"dot {line.look}"),
            f"{line.name}, {x_name} {place:g}: {value:.4g}",
        )
        for line in lines
        if len(line.points) <= 60
        for place, value in line.points
    ]
    drawing = [_rules(y), _below([(x.at(tick), f"{tick:g}") for tick in x.ticks()], x_name), inner, dots]
    legend = [element("li", _swatch(line.look), line.name) for line in lines]
    return [_chart(label, *drawing), element("ul", legend, class_="legend")]


@dataclass(frozen=True)
class Column:
    """One place of a horizontal axis.

    Attributes:
        name: below the axis.
        parts: heights stacked on each other.
        title: shown when pointed at.
    """

    name: str
    parts: Sequence[float]
    title: str


def column_chart(columns: Sequence[Column], label: str, x_name: str = "layer") -> Element:
    """Bars side by side; the parts of a bar are `a`, `b`."""
    y = value_axis([sum(column.parts) for column in columns])
    width = 1 / len(columns)
    bars = []
    for index, column in enumerate(columns):
        top = 0.0
        for look, part in zip("ab", column.parts, strict=False):
            top += part
            place = {"x": _share((index + 0.12) * width), "width": _share(0.76 * width)}
            height = {"y": _share(1 - y.at(top)), "height": _share(y.at(part) - y.at(0))}
            bars.append(_with_title(element("rect", **place, **height, class_=f"bar {look}"), column.title))
    return _chart(label, _rules(y), _below(_every_so_often([column.name for column in columns]), x_name), bars)


@dataclass(frozen=True)
class Range:
    """Smallest, mean and largest value at one place of a horizontal axis."""

    name: str
    low: float
    middle: float
    high: float


def range_chart(ranges: Sequence[Range], label: str, x_name: str = "layer") -> Element:
    """A dot for the mean, a line from the smallest to the largest value."""
    y = value_axis([each.high for each in ranges])
    marks = []
    for index, each in enumerate(ranges):
        x = _share((index + 0.5) / len(ranges))
        title = f"{x_name} {each.name}: {each.middle:.3g} ({each.low:.3g} to {each.high:.3g})"
        ends = {"y1": _share(1 - y.at(each.low)), "y2": _share(1 - y.at(each.high))}
        marks += [
            _with_title(element("line", x1=x, x2=x, **ends, class_="span"), title),
            _with_title(element("circle", cx=x, cy=_share(1 - y.at(each.middle)), r=3, class_="dot a"), title),
        ]
    return _chart(label, _rules(y), _below(_every_so_often([each.name for each in ranges]), x_name), marks)


def interval_strip(measured: Sequence[tuple[str, float, Sequence[float]]], label: str) -> Element:
    """Fractions with their confidence intervals on one line from 0 to 1.

    Args:
        measured: look (`a` or `b`), value and bounds.
        label: what it says.
    """
    marks = []
    for index, (look, value, (low, high)) in enumerate(measured):
        y = f"{100 * (index + 1) / (len(measured) + 1):.0f}%"
        marks.append(element("line", x1=_share(low), x2=_share(high), y1=y, y2=y, class_=f"span {look}"))
        marks.append(element("circle", cx=_share(value), cy=y, r=4.5, class_=f"dot {look}"))
    rules = [element("line", x1=x, x2=x, y1=0, y2="100%", class_="rule") for x in ("0%", "25%", "50%", "75%", "100%")]
    return element("svg", rules, marks, class_="strip", role="img", aria_label=label)


def matrix_chart(
    values: Sequence[Sequence[float | None]], names: Sequence[str], label: str, what: str, most: float
) -> Element:
    """A square of shades for values from 0.

    Args:
        values: rows; None leaves a place empty.
        names: of rows and columns.
        label: what the chart says.
        what: a row and a column are, such as "layer".
        most: the value of the strongest shade.
    """
    size = 1 / len(names)
    cells = [
        _with_title(
            element(
                "rect",
                x=_share(column * size),
                y=_share(row * size),
                width=_share(size),
                height=_share(size),
                class_=shade(value, most),
            ),
            f"{what} {names[row]}, {what} {names[column]}: {value:.2f}",
        )
        for row, line in enumerate(values)
        for column, value in enumerate(line)
        if value is not None
    ]
    places = _every_so_often(names)
    left = [element("text", name, x=0, y=_share(place), dx=-8, dy=4, class_="end") for place, name in places]
    return _chart(label, left, _below(places, what), cells, class_="chart square")


def shade(value: float, most: float = 1.0) -> str:
    """Class of a heat map's cell.

    Args:
        value: what it shows, from 0.
        most: the value of the strongest shade.
    """
    return f"s{round(SHADES * min(max(value / most, 0.0), 1.0)) if most > 0 else 0}"


def scale(most: str, *more: str) -> Element:
    """The key to the shades: from 0 to what the strongest one means, and what else there is to say."""
    steps = [element("span", class_=f"s{step}") for step in range(0, SHADES + 1, 2)]
    return element(
        "p", "0 ", element("span", steps, class_="scale", aria_hidden="true"), f" {most}", *more, class_="note"
    )


def thinned(points: Points, most: int = 300) -> tuple[list[tuple[float, float]], int]:
    """Points few enough to draw: means over equal runs of neighbours.

    Args:
        points: in order.
        most: how many may remain.

    Returns:
        The points, and how many of those given one stands for.
    """
    together = math.ceil(len(points) / most) if points else 1
    runs = [points[start : start + together] for start in range(0, len(points), together)]
    return [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs], together


def _chart(label: str, *drawing: Any, class_: str = "chart") -> Element:
    return element("svg", *drawing, class_=class_, role="img", aria_label=label)


def _rules(y: Axis) -> list[Element]:
    drawn = []
    for tick in y.ticks(4):
        place = _share(1 - y.at(tick))
        drawn.append(element("line", x1=0, x2="100%", y1=place, y2=place, class_="rule"))
        drawn.append(element("text", _short(tick), x=0, y=place, dx=-8, dy=4, class_="end"))
    return drawn


def _below(places: Sequence[tuple[float, str]], name: str) -> list[Element]:
    ticks = [element("text", text, x=_share(place), y="100%", dy=18, class_="middle") for place, text in places]
    return [*ticks, element("text", name, x="50%", y="100%", dy=36, class_="middle axis")]


def _every_so_often(names: Sequence[str]) -> list[tuple[float, str]]:
    """Names of some columns, few enough for a phone."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(names) / step <= 12)
    return [((index + 0.5) / len(names), name) for index, name in enumerate(names) if index % step == 0]


def _path(points: Points, x: Axis, y: Axis) -> str:
    return " ".join(f"{100 * x.at(place):.2f},{100 * (1 - y.at(value)):.2f}" for place, value in points)


def _swatch(look: str) -> Element:
    line = element("line", x1=0, x2="100%", y1="50%", y2="50%", class_=f"line {look}")
    dot = element("circle", cx="50%", cy="50%", r=3, class_=f"dot {look}")
    return element("svg", line, dot, class_="swatch", aria_hidden="true")


def _with_title(drawn: Element, title: str) -> Element:
    drawn.append(element("title", title))
    return drawn


def _share(place: float) -> str:
    return f"{100 * place:.2f}%"


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"

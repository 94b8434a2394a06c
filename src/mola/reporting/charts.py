"""Geometry of charts. The template `charts.html` draws them as SVG in the colours of the page.

Positions are in per cent of the drawing and type is in pixels of the screen, so a narrow chart stays legible. Labels
of the axes lie outside the drawing, where the style sheet leaves space.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

SHADES = 20  # steps of a heat map's scale; the style sheet has one class for each
_MIN_LOG_RATIO = 10.0  # smallest ratio of the largest to the smallest value for a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """Maps values to positions from 0 to 1."""

    low: float  # value at 0
    high: float  # value at 1
    is_log: bool = False  # whether equal ratios, not equal differences, have equal lengths
    is_whole: bool = False  # whether all values are integers

    def position(self, value: float) -> float:
        """Position of a value."""
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
            digits = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            values = [digit * 10.0**decade for decade in decades for digit in digits]
        else:
            wanted = (self.high - self.low) / count
            size = 10.0 ** math.floor(math.log10(wanted))
            step = min((factor * size for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / wanted)))
            step = max(step, 1.0) if self.is_whole else step
            first = math.ceil(self.low / step - 1e-9)
            values = [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [value for value in values if -1e-9 <= self.position(value) <= 1 + 1e-9]


def value_axis(values: Sequence[float], *, may_be_log: bool = False, is_whole: bool = False) -> Axis:
    """An axis for measured values that contains 0, or a logarithmic axis if they differ by orders of magnitude.

    `is_whole` is for integers, such as counts.
    """
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= _MIN_LOG_RATIO:
        return Axis(low / 1.15, high * 1.15, is_log=True)
    high = max(high * 1.05, 1.0 if is_whole else 0.0) or 1.0
    return Axis(min(low * 1.05, 0.0), high, is_whole=is_whole)


@dataclass(frozen=True)
class Line:
    """One curve: its name, its points (at least one), and its class in the style sheet (`a`, `b` or `c`)."""

    name: str
    points: Points
    css_class: str


def step_axis(lines: Sequence[Line]) -> Axis:
    """The horizontal axis of curves."""
    steps = [step for line in lines for step, _ in line.points]
    return Axis(min(steps), max(steps), is_whole=True)


@dataclass(frozen=True)
class Column:
    """One column of a chart."""

    name: str  # below the axis
    parts: Sequence[float]  # heights stacked on each other
    title: str  # shown when pointed at


@dataclass(frozen=True)
class Range:
    """Smallest, mean and largest value at one position of a horizontal axis."""

    name: str
    low: float
    middle: float
    high: float


def shade(value: float, largest: float = 1.0) -> str:
    """Class of a heat map's cell that shows a value from 0; `largest` has the strongest shade."""
    return f"s{round(SHADES * min(max(value / largest, 0.0), 1.0)) if largest > 0 else 0}"


def thinned(points: Points, max_points: int = 300) -> tuple[list[tuple[float, float]], int]:
    """At most `max_points` points, each the mean of a number of neighbouring points, and this number."""
    points_per_mean = math.ceil(len(points) / max_points) if points else 1
    runs = [points[start : start + points_per_mean] for start in range(0, len(points), points_per_mean)]
    return [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs], points_per_mean


def axis_names(names: Sequence[str]) -> list[tuple[float, str]]:
    """Positions and names of at most 12 columns, since 12 names fit on a phone."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(names) / step <= 12)
    return [((index + 0.5) / len(names), name) for index, name in enumerate(names) if index % step == 0]


def share(position: float) -> str:
    """A position as text for SVG: 0.5 -> 50.00%."""
    return f"{100 * position:.2f}%"


def tick(value: float) -> str:
    """A value as text for an axis: 2500 -> 2.5k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"

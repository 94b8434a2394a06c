"""Charts: places of values, ticks, what stands for what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola.reporting.charts import Axis, Column, Line, shade, step_axis, thinned, value_axis
from mola.reporting.document import environment
from mola.reporting.formatting import duration, number, percent, points
from mola.reporting.heatmaps import change_map
from mola.reporting.routing_log import layer_parts
from tests.reporting.pages import Page

sizes = st.floats(1e-6, 1e9)


@given(st.lists(sizes, min_size=1), st.booleans())
def test_values_lie_in_the_drawing_and_ticks_on_the_axis(values, may_be_log):
    axis = value_axis(values, may_be_log=may_be_log)
    assert all(-1e-9 <= axis.position(value) <= 1 + 1e-9 for value in values)
    ticks = axis.ticks()
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 20
    assert all(-1e-6 <= axis.position(tick) <= 1 + 1e-6 for tick in ticks)


@given(st.floats(-1e6, 1e6), sizes)
def test_a_linear_axis_has_some_ticks(low, length):
    assert 3 <= len(Axis(low, low + max(length, 1e-3)).ticks()) <= 9


def test_ticks():
    assert Axis(0, 8.4).ticks(4) == [0, 2, 4, 6, 8]
    assert Axis(0.03, 1.8, is_log=True).ticks() == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])
    assert Axis(3, 3).position(3) == 0.5


def test_ticks_of_counts_are_whole():
    assert value_axis([0, 0], is_whole=True).ticks(4) == [0, 1]
    assert value_axis([2, 1], is_whole=True).ticks(4) == [0, 1, 2]
    assert step_axis([Line("a", [(1, 0.5), (3, 0.2)], "a")]).ticks() == [1, 2, 3]


def test_a_change_too_small_for_its_map_has_no_sign():
    rows = [(0, 0, 2.0), (0, 1, -0.04), (1, 0, -0.3), (1, 1, 0.03)]
    assert [[cell.text for cell in cells] for _, cells in change_map(rows, "loss").rows] == [["+20", "−3"], ["0", "0"]]


def drawn(chart, *arguments):
    """A chart of the template as a tree."""
    return Page(str(getattr(environment().get_template("charts.html").module, chart)(*arguments))).root


def test_bars_are_as_high_as_their_values():
    columns = [Column("0", [3.0, 1.0], "zero"), Column("1", [8.0, 0.0], "one")]
    bars = drawn("column_chart", columns, "Two columns").all("rect")
    heights = [float(bar.attributes["height"].rstrip("%")) for bar in bars]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.05)
    assert heights[2] == pytest.approx(8 / 3 * heights[0], abs=0.05)
    assert [bar.one("title").text for bar in bars] == ["zero", "zero", "one", "one"]


def test_interval():
    strip = drawn("interval_strip", [("a", 0.5, (0.25, 0.75))], "half")
    line = strip.one("line", class_="span a")
    assert (line.attributes["x1"], line.attributes["x2"]) == ("25.00%", "75.00%")
    assert strip.one("circle").attributes["cx"] == "50.00%"


@given(st.lists(st.floats(-1e3, 1e3), max_size=2000), st.integers(1, 300))
def test_thinning_keeps_the_mean(values, most):
    points, points_per_mean = thinned(list(enumerate(values)), most)
    assert len(points) <= most
    weights = [min(points_per_mean, len(values) - start) for start in range(0, len(values), points_per_mean)]
    total = sum(weight * value for weight, (_, value) in zip(weights, points, strict=True))
    assert total == pytest.approx(sum(values), abs=1e-6 * max(1, len(values)))


@given(st.sets(st.integers(0, 100), min_size=1))
def test_parts_of_layers(indices):
    parts = layer_parts(indices)
    assert [layer for part in parts for layer in part] == sorted(indices)
    assert len(parts) == min(3, len(indices))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shades():
    assert [shade(value, 0.5) for value in (0.0, 0.25, 0.5, 0.7, -1.0)] == ["s0", "s10", "s20", "s20", "s0"]
    assert shade(0.0, 0.0) == "s0"


def test_formatted_numbers():
    assert percent(0.35) == "35.0\u00a0%"
    assert percent(float("nan")) == percent(None) == number(None) == "–"
    assert number(1234567) == "1,234,567"
    assert number(0.07318) == "0.0732"
    assert [duration(seconds).replace("\u00a0", " ") for seconds in (2.104, 194.1, 7290)] == [
        "2.1 s",
        "3 min 14 s",
        "2 h 1 min",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.35, "+35.0"),
        (0.0025, "+0.3"),
        (-0.0025, "-0.3"),
        (-0.0001, "+0.0"),
    ],
)
def test_points_round_halves_away_from_zero(value, shown):
    assert points(value) == shown
    assert points(value, "") == shown.removeprefix("+")

"""The picture of the layers and their experts."""

from xml.etree import ElementTree

import pytest
from benchmarks.layers_plot import PlotOptions, draw, main
from matplotlib.colors import to_rgba

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (PlotOptions(), {"layers 0 to 7": 2, "layers 8 to 15": 4, "layers 16 to 23": 6, "layers 24 to 31": 8}),
        (PlotOptions("3,1,1", 3), {"layer 0": 3, "layers 1 to 2": 1}),
    ],
)
def test_each_row_has_its_experts_and_marks_those_that_a_token_uses(options, rows):
    (axes,) = draw(options).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    colors = [[bar.get_facecolor() for bar in bars] for bars in axes.containers]
    assert [len(row) for row in colors] == list(rows.values())
    assert [row.count(to_rgba("#009E73")) for row in colors] == [min(2, count) for count in rows.values()]


def test_the_command_writes_svg(tmp_path, capsys):
    output = tmp_path / "layers.svg"
    assert main(["--num_experts", "4-8", "--top_k", "1", "--output", str(output)]) == 0
    words = {element.text for element in ElementTree.parse(output).iter(f"{SVG}text")}
    assert {"layers 0 to 15", "layers 16 to 31", 'num_experts="4-8", top_k=1'} <= words
    assert main(["--num_experts", "24", "--output", str(output)]) == 2
    assert main(["--top_k", "0", "--output", str(output)]) == 2
    assert "`top_k` must be at least 1: got 0." in capsys.readouterr().err

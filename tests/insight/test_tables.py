"""Tables of gates: every number where it belongs, text of a model is no HTML."""

from html.parser import HTMLParser

import torch

from mola.insight.recorder import ModuleGates
from mola.insight.tables import layers_table, tokens_table


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        else:
            assert tag in ("div", "table", "caption", "thead", "tbody", "code"), tag

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


TWO = ModuleGates("layers.0.q_proj", 0, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), torch.zeros(3))
THREE = ModuleGates(
    "layers.1.q_proj", 1, torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.0, 0.75], [0.0, 0.0, 1.0]]), torch.zeros(3)
)


def test_mean_gate_by_layer():
    assert Cells(layers_table([TWO, THREE], slice(0, 2))).rows == [
        ["layer", "expert 0", "expert 1", "expert 2"],
        ["0", "75", "25", ""],
        ["1", "25", "38", "38"],
    ]


def test_mean_gates_without_tokens():
    assert Cells(layers_table([TWO], slice(3, None))).rows[1] == ["0", "·", "·"]


def test_gates_by_token():
    assert Cells(tokens_table(THREE, ["a", "<script>", "&"], slice(1, None))).rows == [
        ["token", "expert 0", "expert 1", "expert 2"],
        ["<script>", "25", "·", "75"],
        ["&", "·", "·", "100"],
    ]

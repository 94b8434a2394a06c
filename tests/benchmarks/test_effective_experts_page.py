"""Tables and picture of what a token sees, from records made by hand."""

import copy
import json
from xml.etree import ElementTree

import pytest
from benchmarks.effective_experts_page import draw, main, norm_over, page, read

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = {"cpu": "Abacus 9000", "gpu": None, "threads": 3}


def spread(value):
    return {"mean": value, "p10": value / 2, "p50": value, "p90": value * 2}


def a_linear(layer, linear, experts, rank):
    has_router = experts > 1
    return {
        "module": f"model.layers.{layer}.{linear}",
        "layer_index": layer,
        "linear": linear,
        "num_experts": experts,
        "top_k": min(experts, 2),
        "r": rank,
        "tokens": 100,
        "mean_gates": [1 / experts] * experts,
        "first_gate_above": 0.25 if has_router else 1.0,
        "mean_update_rank": rank * 0.75,
        "effective_experts": spread(1.5 if has_router else 1.0),
        "effective_rank": spread(rank / 2),
        "update_norm": spread(2.0 * layer + 2 if has_router else 4.0),
        "relative_norm": spread(0.125),
        "gradient": {"A": [], "B": [], "shares": [], "effective_experts": 1.75 if has_router else 1.0},
        "training_gates": [0.5] * 2 if has_router else None,
    }


def an_adapter(name, experts, rank):
    linears = [a_linear(layer, linear, experts[layer], rank) for layer in (1, 0) for linear in ("q_proj", "v_proj")]
    return {"name": name, "trained_values": 12345, "loss": 0.5, "linears": linears}


RECORD = {
    "format": 1,
    "base_model": "a-model",
    "data": "abc",
    "samples": 7,
    "tokens": 1234,
    "batch_size": 8,
    "first_gate": 0.9,
    "dtype": "float32",
    "adapters": [an_adapter("2468", [2, 4], 8), an_adapter("lora", [1, 1], 43)],
    "machine": MACHINE,
    "versions": {},
}


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "seen.json"
    path.write_text(json.dumps(RECORD))
    return str(path)


def table(text, heading):
    """Name of a row -> its cells, of the table under a heading."""
    lines = text.split(heading)[1].split("\n\n")[1].splitlines()
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}


def test_tables_have_means_over_linears(record):
    text = page(read([record]))
    assert "7 samples, 1,234 tokens; base model a-model" in text
    assert "Abacus 9000, 3 threads." in text
    assert "over that of `lora`" in text
    whole = table(text, "whole training.")
    shared = ["1.5", "0.75 to 3", "25.0 %", "4", "2 to 8", "16", "6", "12.5 %"]
    assert whole["2468"] == ["12,345", "2 to 4", "0.5", *shared, "0.75", "1.75", "2"]
    assert whole["lora"][1:4] == ["1", "0.5", "1"]
    assert whole["lora"][-3:] == ["1", "1", "–"]
    layers = table(text, "## 2468, by layer")
    assert list(layers) == ["0", "1"]
    assert [layers[name][0] for name in "01"] == ["2", "4"]
    assert [layers[name][-3] for name in "01"] == ["0.5", "1"]
    assert list(table(text, "## lora, by linear")) == ["q_proj", "v_proj"]


def test_without_a_lora_there_is_no_norm_to_compare_with():
    alone = {**RECORD, "machines": [MACHINE], "adapters": RECORD["adapters"][:1]}
    assert "LoRA's, which is not among the adapters" in page(alone)
    assert norm_over(RECORD["adapters"][0]["linears"], None) is None


def test_the_picture_has_every_adapter(record, tmp_path, capsys):
    picture = tmp_path / "seen.svg"
    assert main([record, "--picture", str(picture)]) == 0
    assert "## lora, by layer" in capsys.readouterr().out
    words = [element.text for element in ElementTree.parse(picture).iter(f"{SVG}text")]
    assert {"2468", "lora", "effective experts of a token"} <= set(words)
    ranks = draw(RECORD).axes[1]
    assert [list(line.get_ydata()) for line in ranks.get_lines()] == [[4, 4], [6, 6], [21.5, 21.5], [32.25, 32.25]]
    assert [list(line.get_xdata()) for line in ranks.get_lines()] == [[0, 1]] * 4
    assert main([record, "--picture", str(picture)]) == 2
    assert "`picture` must be a new file" in capsys.readouterr().err


def test_records_are_joined_if_they_are_alike(record, tmp_path, capsys):
    other = copy.deepcopy(RECORD)
    for each in other["adapters"]:
        each["name"] += " again"
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    assert [each["name"] for each in read([record, str(path)])["adapters"]] == [
        "2468",
        "lora",
        "2468 again",
        "lora again",
    ]
    assert main([record, record]) == 2
    assert "two adapters named '2468'" in capsys.readouterr().err
    path.write_text(json.dumps({**other, "data": "another"}))
    assert main([record, str(path)]) == 2
    assert "must have the same `data`" in capsys.readouterr().err

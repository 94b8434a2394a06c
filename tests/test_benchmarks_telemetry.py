"""The suites about looking at experts: what recording costs, and what distances need; from end to end."""

import json

import pytest
from benchmarks.command import main


def run(output, *words):
    return main(["--output", str(output), *map(str, words)])


def test_the_suite_telemetry(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    small = ("--batch_size", 2, "--seq_len", 12, "--num_experts", "1248", "--repeats", 2, "--dropout", 0)
    assert run(output, "--model", tiny_model_dir, "--suite", "telemetry", *small) == 0
    assert "telemetry: model" in capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["telemetry"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["routers"] == 3 * 7
        on, off = (row[f"{name}_seconds"]["samples"] for name in ("on", "off"))
        ratios = [one / other for one, other in zip(on, off, strict=True)]
            on / off for on, off in zip(*(row[f"{name}_seconds"]["samples"] for name in ("on", "off")), strict=True)
        ]
        assert row["on_over_off"]["samples"] == pytest.approx(ratios)
        assert row["line_seconds"]["median"] > 0


@pytest.mark.slow
def test_the_suite_redundancy(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert run(output, "--model", tiny_model_dir, "--suite", "redundancy") == 0
    assert "redundancy: num_experts 8" in capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["redundancy"]
    assert [row["features_out"] for row in rows] == [4096, 11008]
    for row in rows:
        assert row["largest_relative_difference"] < 1e-5
        assert row["direct_over_factors"] > 100

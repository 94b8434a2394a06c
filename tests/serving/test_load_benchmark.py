"""The benchmarks of load run and find every answer right."""

import json
from pathlib import Path

import pytest

import mola

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("openai", reason="needs the extra `test`")

from benchmarks.serve_load import main

from benchmarks import serve_endurance


@pytest.mark.slow
def test_rows_for_offline_batching_and_every_number_of_clients(endless_model_dir, tmp_path):
    output = tmp_path / "load.json"
    words = f"--base_model {endless_model_dir} --clients 1 3 --requests 6 --max_tokens 3 --dtype float32 --device cpu"
    before = str(Path(mola.__file__).parents[1])
    assert main([*words.split(), "--batching", "true", "--before", before, "--output", str(output)]) == 0
    rows = {row["what"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == [
        "offline, base",
        "offline, first",
        "continuous batching, first",
        "offline, second",
        "server, 1 client",
        "before, 1 client",
        "server, 3 clients",
        "before, 3 clients",
    ]
    assert all(rows[f"server, {name}"]["wrong"] == 0 for name in ("1 client", "3 clients"))
    assert all(row["seconds"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    "words",
    [
        ["--base_model", "missing"],
        ["--before", "missing"],
        ["--clients", "0"],
        ["--requests", "-1"],
        ["--max_tokens", "0"],
    ],
)
def test_wrong_options_end_with_2(words, endless_model_dir, capsys):
    arguments = words if words[0] == "--base_model" else ["--base_model", str(endless_model_dir), *words]
    assert main(arguments) == 2
    assert words[0].removeprefix("--") in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory in /proc, which is Linux's")
def test_mixed_load_loses_nothing(endless_model_dir, tmp_path):
    output = tmp_path / "endurance.json"
    words = ["--base_model", str(endless_model_dir), "--minutes", "0.2", "--every", "0.5", "--output", str(output)]
    assert serve_endurance.main(words) == 0
    record = json.loads(output.read_text())
    assert set(record["requests"]) == {"streamed", "whole", "sampled", "leaving", "long", "refused", "loading"}
    assert record["left_at_the_end"] == {"status": "ok", "running": 0, "waiting": 0}
    assert record["memory_mib"]["most"] > 100
    assert serve_endurance.main(["--base_model", str(endless_model_dir), "--minutes", "0"]) == 2

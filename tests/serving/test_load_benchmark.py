"""The benchmark of load runs and finds every answer right."""

import json
from pathlib import Path

import pytest

import mola

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("openai", reason="needs the extra `test`")

from benchmarks.serve_load import main

from benchmarks import serve_skills


@pytest.mark.slow
def test_rows_for_offline_batching_and_every_number_of_clients(endless_model_dir, tmp_path):
    output = tmp_path / "load.json"
    words = f"--base_model {endless_model_dir} --clients 1 3 --requests 6 --max_tokens 3 --dtype float32 --device cpu"
    before = str(Path(mola.__file__).parents[1])
    assert main([*words.split(), "--before", before, "--output", str(output)]) == 0
    rows = {row["what"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == [
        "offline, base",
        "offline, first",
        "offline, second",
        "server, 1 client",
        "before, 1 client",
        "server, 3 clients",
        "before, 3 clients",
    ]
    assert all(rows[f"server, {name}"]["wrong"] == 0 for name in ("1 client", "3 clients"))
    assert all(row["seconds"] > 0 for row in rows.values())


def test_the_other_version_must_be_there(endless_model_dir, capsys):
    assert main(["--base_model", str(endless_model_dir), "--before", "missing"]) == 2
    assert "before" in capsys.readouterr().err


@pytest.mark.slow
def test_skills_under_load_answer_like_each_skill_alone(endless_model_dir, tmp_path):
    output = tmp_path / "skills.json"
    words = f"--base_model {endless_model_dir} --clients 1 3 --requests 12 --max_tokens 3 --names 8 --layer 2"
    words += " --dtype float32 --device cpu --max_loaded_skills 2"
    assert serve_skills.main([*words.split(), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [row["what"] for row in result["rows"]] == ["8 skills, 1 client", "8 skills, 3 clients"]
    assert (result["wrong"], result["decided"]) == (0, 12)

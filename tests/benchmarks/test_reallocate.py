"""`python -m benchmarks.reallocate`: every way is measured, from the same start."""

import json

import pytest
from benchmarks.reallocate import WAYS, main


@pytest.mark.slow
def test_from_end_to_end(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "result.json"
    steps = ["--first_steps", "5", "--more_steps", "5", "--held_out", "4", "--num_experts", "3", "--shape", "15"]
    ways = ["--ways", "drop, fresh", "merge, copy"]
    assert main(["--base_model", str(tiny_model_dir), "--output", str(output), *steps, *ways]) == 0
    rows = {row["what"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["before"]["num_experts"] == [1, 1, 5, 5]
    assert len(rows) == 3 + 2
    for name in ("drop, fresh", "merge, copy"):
        assert rows[name]["right_after"] != rows["before"]["right_after"]
        assert rows[name]["after"] > 0
    assert "right after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"), [(["--ways", "guess"], "`ways` must be among"), (["--base_model", "nosuch"], "`base_model`")]
)
def test_wrong_options(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert "drop, fresh" in WAYS

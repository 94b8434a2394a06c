"""The step times of the changes to training, with a tiny model."""

import json

from benchmarks.training_changes import RECIPES, main


def test_each_recipe_is_timed_and_compared(tmp_path, tiny_model_dir, capsys):
    record = tmp_path / "steps.json"
    assert main(["--base_model", str(tiny_model_dir), "--seq_len", "8", "--repeats", "2", "--output", str(record)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(record.read_text(encoding="utf-8"))["recipes"]
    assert list(rows) == list(RECIPES)
    assert all(name in printed for name in RECIPES)
    assert rows["5555"]["ratio"]["samples"] == [1.0, 1.0]
    assert {row["compared_with"] for row in rows.values()} <= set(RECIPES)

"""`python -m benchmarks.skills` from end to end on the tiny model."""

import json

from benchmarks.skills import main


def test_costs_of_skills_are_measured(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "skills.json"
    size = {"--skills": "1 3", "--mixed_rows": "2", "--prompt_tokens": "5", "--new_tokens": "2", "--repeats": "1"}
    words = [word for name, value in size.items() for word in (name, *value.split())]
    assert main(["--base_model", str(tiny_model_dir), "--output", str(output), *words]) == 0
    record = json.loads(output.read_text())
    assert [row["skills"] for row in record["rows"]] == [1, 3]
    assert all(row["token_skills_ratio"]["median"] > 0 for row in record["rows"])
    assert record["mixed"]["mixed_peft_ratio"]["median"] > 0
    assert {*record["median_seconds"]} == {"add", "load", "peft_load_adapter"}
    assert "Rows with different skills" in capsys.readouterr().out
    assert main(["--skills", "3", "1"]) == 2

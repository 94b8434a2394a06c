"""The study of mixtures made of LoRAs: docs/export.md says what its record does, and a stopped one goes on."""

import json
from pathlib import Path

import pytest
from studies.from_lora import KINDS, RUNS, Study, StudyOptions, main, table

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "studies" / "from_lora.json"


def test_every_training_is_in_the_record_and_the_page_has_its_table():
    study = Study(StudyOptions(record=str(RECORD)))
    assert study.left() == []
    assert {len(marks) for run in study.record["runs"] for marks in run["marks"]} == {len(study.record["kinds"])}
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8").splitlines()
    for line in table(study.record).splitlines():
        assert line in page


@pytest.mark.slow
def test_the_command_goes_on_and_trains_nothing_twice(tiny_model_dir, tmp_path, capsys):
    record = tmp_path / "record.json"
    words = ["--base_model", tiny_model_dir, "--output_dir", tmp_path / "runs", "--record", record, "--seeds", 1]
    words = [str(word) for word in [*words, "--steps", 6, "--lora_steps", 5]]
    assert main([*words, "--at_most", "2"]) == 0
    assert "4 trainings left\n" in capsys.readouterr().out
    first = json.loads(record.read_text())["runs"]
    assert [run["name"] for run in first] == list(KINDS[:2])
    assert main(words) == 0
    runs = json.loads(record.read_text())["runs"]
    assert runs[:2] == first
    assert [run["name"] for run in runs] == list(RUNS)
    assert [len(run["loss"]) for run in runs] == [len(run["marks"]) for run in runs] == [1, 1, 1, 2, 2, 1]
    sizes = {run["name"]: run["trained"] for run in runs}
    assert sizes["made"] == sizes["fresh"] == sizes["longer"]
    content = record.read_bytes()
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out == table(json.loads(content)) + "\n"
    assert record.read_bytes() == content
    assert main([*words, "--steps", "7"]) == 2
    assert "`steps` must be [5, 6]" in capsys.readouterr().err

"""The study of skills from end to end, with a tiny model and two steps for each training."""

import json

import pytest

from benchmarks import skills_study


@pytest.fixture
def tiny_study(monkeypatch):
    monkeypatch.setitem(skills_study.DATA, 5, {"train_size": 100, "validation_size": 5, "test_size": 15})
    monkeypatch.setitem(skills_study.PROTOCOL, "cutoff_len", 1024)
    for name, value in {"r": "2", "max_steps": 2, "layer": 1}.items():
        monkeypatch.setitem(skills_study.SKILL, name, value)
    monkeypatch.setitem(
        skills_study.SEQUENTIAL, "lora", {"num_experts": "1", "r": "4", "num_train_epochs": 0.4, "learning_rate": 0.01}
    )


@pytest.mark.slow
def test_methods_of_a_seed_are_recorded(tiny_study, tmp_path, tiny_model_dir):
    where = ["--output", str(tmp_path / "runs"), "--records", str(tmp_path), "--base_model", str(tiny_model_dir)]
    methods = ["skills", "own", "sum", "converted", "joint", "replay", "lora"]
    assert skills_study.main(["--kinds", "5", "--seeds", "0", "--methods", *methods, *where]) == 0
    record = json.loads((tmp_path / "5_kinds" / "seed_0.json").read_text(encoding="utf-8"))
    assert sorted(record["methods"]) == sorted(methods)
    for found in record["methods"].values():
        assert {kind: len(marks) for kind, marks in found["marks"].items()} == dict.fromkeys(record["order"], 3)
    assert [len(stage) for stage in record["methods"]["replay"]["stages"]] == [1, 2, 3, 4, 5]

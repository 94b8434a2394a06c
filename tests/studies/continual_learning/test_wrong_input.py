"""Options of a sequence and its stages that are refused before anything is trained."""

import re

import pytest

from mola import ContinualOptions, MolaError, TrainOptions, continual
from mola.cli import main
from mola.studies.continual_learning.stages import check_stages
from tests.studies.continual_learning.sequences import flags

WRONG = [
    ({"stages": {}}, ["`stages`", "empty"]),
    ({"stages": '["a"]'}, ["`stages`", "mapping"]),
    ({"stages": '{"a": {}, "a": {}}'}, ["`stages`", "'a' twice"]),
    ({"stages": {"a/b": {}}}, ["`stages`", "'a/b'"]),
    ({"stages": {"a": 3}}, ["`stages.a`", "3"]),
    ({"stages": {"a": {"limt": 3}}}, ["stage `a`", "`limt`", "`limit`"]),
    ({"stages": {"a": {"num_experts": 2}}}, ["stage `a`", "`num_experts`", "same in all stages"]),
    ({"stages": {"a": {"adapter": "x"}}}, ["stage `a`", "`adapter`"]),
    ({"stages": {"a": {"learning_rate": -1}}}, ["stage `a`", "`learning_rate`", "-1"]),
    ({"stages": {"a": {}, "b": {"task": "nosuch"}}}, ["stage `b`", "`task`", "'nosuch'"]),
    ({"stages": {"a": {}, "b": {"test_split": "exam"}}}, ["stage `b`", "`test_split`", "'exam'", "validation"]),
    ({"stages": {"a": {}, "b": {"test_split": "train"}}}, ["stage `b`", "`test_split`", "not used for training"]),
    ({"stages": {"a": {}, "b": {"cutoff_len": 20}}}, ["stage `b`", "`cutoff_len`", "20"]),
    ({"stages": {"a": {}, "b": {"max_new_tokens": 2000, "scoring": "generate"}}}, ["stage `b`", "1024"]),
    ({"stages": {"a": {}, "b": {"filters": {"topic": "art"}}}}, ["stage `b`", "`filters`", "'art'", "'physics'"]),
    (
        {"router_aux_loss_coef": 0.01, "stages": {"a": {}, "b": {"label_smoothing_factor": 0.1}}},
        ["stage `b`", "`label_smoothing_factor`", "`router_aux_loss_coef`"],
    ),
    (
        {"stages": {"a": {}, "b": {"test_split": "validation", "eval_strategy": "steps", "eval_steps": 2}}},
        ["stage `b`", "`load_best_model_at_end` would choose a checkpoint by the test questions"],
    ),
    ({"task": None}, ["stage `physics`", "`task`"]),
    ({"num_experts": "2,4,6"}, ["`num_experts`", "3 entries", "4 layers"]),
    ({"resume_from_checkpoint": "last"}, ["`resume_from_checkpoint`", "resumes"]),
    (
        {"adapter": ".", "num_experts": None, "lora_dropout": None, "stages": {"a": {"lora_dropout": 0.5}}},
        ["stage `a`", "`lora_dropout`", "beside `stages`"],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), WRONG, ids=lambda value: str(value)[:70] if type(value) is dict else "")
def test_wrong_input_is_refused_before_any_stage(values, changes, parts, tmp_path, capsys):
    assert main(flags(values(**changes))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("mola continual: error: ")
    assert [part for part in parts if part not in lines[-1]] == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_tests_of_earlier_stages_are_compared_with_later_data(values, data, caplog):
    """They are asked again: what a later stage trains on is not remembered."""
    test = str(data.parent / "test.json")
    stages = {"a": {}, "b": {"data": test, "test_data": str(data.parent / "validation.json")}}
    check_stages(ContinualOptions(**values(stages=stages, max_steps=1)))
    assert re.search("task `a`: (.+) of the \\1 test questions are also trained on in stage `b`", caplog.text)
    stages["b"] = {"eval_data": test, "load_best_model_at_end": True}
    stages["b"] |= {"eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(MolaError, match="choose a checkpoint in stage `b` by the test questions of `a`"):
        check_stages(ContinualOptions(**values(stages=stages, max_steps=1)))


def test_training_data_without_splits_are_not_tested_on(values, data, tmp_path, capsys):
    stages = {"a": {"data": str(data.parent / "train.json")}}
    assert main(flags(values(stages=stages))) == 2
    assert "`test_data`" in capsys.readouterr().err
    stages["a"]["test_data"] = str(data.parent / "test.json")
    options = ContinualOptions(**values(stages=stages, test_limit=3, max_steps=1))
    assert continual(options).results[0]["tasks"]["a"]["total"] == 3


def test_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MolaError, match=r"`output_dir`.*continual\.json"):
        run()
    (tmp_path / "run" / "continual.json").write_text("[]", encoding="utf-8")
    with pytest.raises(MolaError, match=r"cannot be read .*Restore it, or pass a different `output_dir`"):
        run()
    (tmp_path / "run" / "continual.json").write_text("[", encoding="utf-8")
    with pytest.raises(MolaError, match="cannot be read"):
        run()


def test_several_processes_are_refused(values, monkeypatch):
    monkeypatch.setattr(TrainOptions, "world_size", property(lambda self: 2))
    with pytest.raises(MolaError, match="one process: got 2"):
        ContinualOptions(**values())

"""`mola compare` goes on with what was begun, and takes nothing for it that was begun with something else."""

import json
import os
import shutil
import signal
from importlib.resources import files

import pytest
from safetensors.torch import load_file, save_file

from mola import MolaError
from mola.evaluation.resuming import AnswersFile
from mola.studies.comparison import runs
from mola.training.callbacks import MetricsFile
from tests.grids import slow
from tests.studies.comparison.comparisons import RECIPES, TASKS, read

ONE = {"tasks": {"physics": TASKS["physics"]}, "recipes": {"lora": RECIPES["lora"]}, "seeds": [0]}
ALONE = {**ONE, "evaluate_base": False}


@pytest.fixture
def stopped(run, monkeypatch):
    """Begins a comparison that is stopped in its first training, after the first step."""

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(**asked):
        with monkeypatch.context() as patch:
            patch.setattr(MetricsFile, "on_step_end", stop, raising=False)
            assert run(**asked).status == "interrupted"

    return begin


@pytest.fixture
def stopped_in_the_test(run, monkeypatch):
    """Begins a comparison that is stopped while its first adapter, or the base model, is tested."""

    def append(self, records):
        raise KeyboardInterrupt

    def begin(**asked):
        with monkeypatch.context() as patch:
            patch.setattr(AnswersFile, "append", append)
            assert run(**asked).status == "interrupted"

    return begin


@pytest.mark.parametrize(
    "change",
    [{"max_steps": 3}, *slow({"dtype": "bfloat16"}, {"test_limit": 3})],
    ids=lambda change: next(iter(change)),
)
def test_a_stopped_training_resumes_only_with_the_same_options(change, run, stopped):
    stopped(**ALONE)
    with pytest.raises(
        MolaError, match=f"seed-0' was begun with a different .* `{next(iter(change))}`: .* Use the same"
    ):
        run(**{**ALONE, **change})
    assert run(**ALONE).status == "finished"


def test_the_base_model_is_tested_as_the_runs_are(whole, run, tmp_path):
    record = str(shutil.copy(whole[0] / "compare.json", tmp_path / "record.json"))
    with pytest.raises(MolaError, match="physics/base model/seed-0 was made with a different setting `scoring`"):
        run(**{**ONE, "scoring": "generate"}, record=record)


def test_another_rule_for_answers_is_refused(run, tmp_path):
    task = tmp_path / "own.yaml"
    text = files("mola.data.tasks").joinpath("sample.yaml").read_text(encoding="utf-8")
    task.write_text(text, encoding="utf-8")
    asked = {**ALONE, "task": str(task), "tasks": {"all": {}}, "scoring": "generate", "max_new_tokens": 2}
    asked["test_limit"] = 4
    run(**asked)
    task.write_text(text.replace("[Aa]nswer(", "[Rr]esult("), encoding="utf-8")
    with pytest.raises(MolaError, match="all/lora/seed-0 was made with a different task `rule`"):
        run(**{**asked, "seeds": [0, 1]})


def test_checkpoints_are_kept_until_their_run_is_finished(run, monkeypatch, tmp_path):
    """The first run ends, the second is stopped after a checkpoint and resumes from it."""
    asked = {**ALONE, "seeds": [0, 1], "save_strategy": "steps", "save_steps": 1}
    folder = tmp_path / "out" / "physics" / "lora"

    def stop(self, args, state, control, **kwargs):
        if args.seed == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_step_end", stop, raising=False)
        assert run(**asked).status == "interrupted"
    assert not list((folder / "seed-0").glob("checkpoint-*"))
    assert (folder / "seed-0" / "adapter_model.safetensors").is_file()
    assert "checkpoint-2" in {path.name for path in (folder / "seed-1").glob("checkpoint-*")}
    assert run(**asked).status == "finished"
    assert not list(folder.rglob("checkpoint-*"))


def test_a_foreign_folder_is_kept(run, tmp_path):
    folder = tmp_path / "out" / "physics" / "lora" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MolaError, match="seed-0.begun.json beside it is missing"):
        run(**ALONE)
    assert (folder / "mine.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_rows_taken_out_of_the_training_data_follow_the_seed(run, stopped_in_the_test):
    asked = {**ALONE, "seeds": [1, 2], "validation_size": 2, "eval_strategy": "epoch", "load_best_model_at_end": False}
    stopped_in_the_test(**asked)
    result = run(**asked)
    assert result.status == "finished"
    first, second = (each.fingerprints for each in result.results)
    assert first["train"] != second["train"]
    assert first["test"] == second["test"]
    assert run(**asked).status == "finished"


def test_a_starting_adapter_is_part_of_what_is_compared(whole, run, tmp_path):
    start = shutil.copytree(whole[0] / "physics" / "2468" / "seed-0", tmp_path / "start")
    asked = {**ALONE, "recipes": {"warm": {"adapter": str(start)}}}
    result = run(**asked)
    assert result.results[0].num_experts == [2, 4, 6, 8]
    assert run(**asked).open == 0
    weights = start / "adapter_model.safetensors"
    values = load_file(weights)
    save_file({name: value + 1 for name, value in values.items()}, weights, {"format": "pt"})
    config = read(start / "adapter_config.json")
    config.pop("weights_sha256")
    (start / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(MolaError, match=r"warm/seed-0 was made with a different data `adapter`"):
        run(**asked)


@pytest.mark.slow
def test_results_of_another_process_are_checked(run, monkeypatch, tmp_path):
    """Both began before there was a result."""
    other = run(**{**ALONE, "seeds": [1]}, learning_rate=0.01, output_dir=str(tmp_path / "other")).record
    trained = runs.train_or_resume

    def and_another_adds(*arguments):
        shutil.copy(other, tmp_path / "out" / "compare.json")
        return trained(*arguments)

    monkeypatch.setattr(runs, "train_or_resume", and_another_adds)
    with pytest.raises(MolaError, match="physics/lora/seed-1 was made with a different setting `learning_rate`"):
        run(**{**ALONE, "seeds": [0, 1]})


def test_identity_of_a_run_is_that_of_its_result(whole):
    folder, _ = whole
    begun = read(folder / "physics" / "lora" / "seed-0.begun.json")
    (result,) = [
        each
        for each in read(folder / "compare.json")["runs"]
        if (each["task"], each["recipe"], each["seed"]) == ("physics", "lora", 0)
    ]
    assert begun["setting"] == result["settings"]
    assert begun["data"] == result["fingerprints"]
    assert begun["model"] == {name: result[name] for name in ("base_model", "dtype")}
    assert begun["task"] == {"rule": result["rule"]}

"""`mola compare` goes on with what was begun, and takes nothing for it that was begun with something else."""

import json
import os
import shutil
import signal
from importlib.resources import files
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mola import MolaError
from mola.data.prepare import PrepareOptions, prepare
from mola.evaluation.resuming import AnswersFile
from mola.studies.comparison import runs
from mola.training.callbacks import MetricsFile
from mola.training.train import TrainOptions, train
from tests.grids import slow
from tests.studies.comparison.comparisons import RECIPES, SETTINGS, TASKS, read

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
    [{"max_steps": 3}, *slow({"weight_decay": 0.1}, {"dtype": "bfloat16"}, {"scoring": "generate"}, {"test_limit": 3})],
    ids=lambda change: next(iter(change)),
)
def test_a_stopped_training_resumes_only_with_the_same_options(change, run, stopped):
    stopped(**ALONE)
    with pytest.raises(
        MolaError, match=f"seed-0' was begun with a different .* `{next(iter(change))}`: .* Use the same"
    ):
        run(**{**ALONE, **change})
    assert run(**ALONE).status == "finished"


def test_the_base_model_is_tested_as_the_runs_are(run, stopped):
    stopped(**ONE)
    with pytest.raises(MolaError, match="physics/base model/seed-0 was made with a different setting `scoring`"):
        run(**{**ONE, "scoring": "generate"})


def test_another_rule_for_answers_is_refused(run, tmp_path):
    task = tmp_path / "own.yaml"
    text = files("mola.data.tasks").joinpath("sample.yaml").read_text(encoding="utf-8")
    task.write_text(text, encoding="utf-8")
    asked = {**ALONE, "task": str(task), "tasks": {"all": {}}, "scoring": "generate", "max_new_tokens": 2}
    run(**asked)
    task.write_text(text.replace("[Aa]nswer(", "[Rr]esult("), encoding="utf-8")
    with pytest.raises(MolaError, match="all/lora/seed-0 was made with a different task `rule`"):
        run(**{**asked, "seeds": [0, 1]})


@pytest.mark.slow
def test_replaced_weights_of_the_base_model_are_an_error(run, tiny_model_dir, tmp_path):
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    assert run(**ONE, base_model=str(base)).status == "finished"
    weights = load_file(base / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "out" / "compare.json").unlink()
    with pytest.raises(MolaError, match="base.json' was begun with a different model `base_model`"):
        run(**ONE, base_model=str(base))
    with pytest.raises(MolaError, match="seed-0' was begun with a different model `base_model`"):
        run(**ALONE, base_model=str(base))


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


@pytest.mark.slow
def test_without_evaluation_data_a_stopped_test_goes_on(run, stopped_in_the_test, tmp_path):
    prepare(PrepareOptions("sample", str(tmp_path / "data"), train_size=10, validation_size=0, test_size=10))
    asked = {**ALONE, "data": str(tmp_path / "data" / "dataset.hf"), "tasks": {"all": {}}, "eval_strategy": "epoch"}
    asked |= {"save_strategy": "epoch", "max_steps": None, "num_train_epochs": 1}
    stopped_in_the_test(**asked)
    weights = tmp_path / "out" / "all" / "lora" / "seed-0" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(**asked).status == "finished"
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize("experts", ["2,", *slow("1")])
def test_a_starting_adapter_is_part_of_what_is_compared(experts, run, data, tiny_model_dir, tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name in TrainOptions.__dataclass_fields__}
    settings |= {"base_model": str(tiny_model_dir), "data": str(data), "num_experts": experts, "max_steps": 1}
    start = tmp_path / "start"
    train(TrainOptions(**settings, output_dir=str(start)))
    asked = {**ALONE, "recipes": {"warm": {"adapter": str(start)}}}
    result = run(**asked)
    assert set(result.results[0].num_experts) == {int(experts.strip(","))}
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


def test_without_adapters_no_checkpoint_stays(run, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    assert run(**ALONE, **saved, keep_adapters=False).status == "finished"
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    assert run(**ALONE, **saved, output_dir=str(tmp_path / "kept")).status == "finished"
    assert list((tmp_path / "kept").rglob("checkpoint-*"))


def test_a_search_on_the_questions_of_the_test_is_refused(run):
    asked = {**ALONE, "tasks": {"physics": {**TASKS["physics"], "test_split": "validation"}}}
    with pytest.raises(MolaError, match="`tuning_split` .'validation'. has the test questions"):
        run(**asked, tune={"learning_rate": [0.01, 0.02]}, tuning_seeds=[5], learning_rate=None)


def test_identity_of_a_run_is_that_of_its_result(run, tmp_path):
    run(**ONE)
    begun = json.loads((tmp_path / "out" / "physics" / "lora" / "seed-0.begun.json").read_text(encoding="utf-8"))
    (result,) = [each for each in read(tmp_path / "out" / "compare.json")["runs"] if each["recipe"] == "lora"]
    assert begun["setting"] == result["settings"]
    assert begun["data"] == result["fingerprints"]
    assert begun["model"] == {name: result[name] for name in ("base_model", "dtype")}
    assert begun["task"] == {"rule": result["rule"]}

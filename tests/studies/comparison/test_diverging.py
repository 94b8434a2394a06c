"""`mola compare`: a training that diverges is a result, with all answers wrong."""

import csv
import io
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file

from mola import MolaError
from mola.training.callbacks import FiniteLoss
from tests.grids import slow
from tests.studies.comparison.comparisons import RECIPES, read

ONE_TASK = {"tasks": {"physics": {"filters": {"topic": "physics"}}}, "evaluate_base": False}
TOO_HIGH = 1e30
SEARCH = {"tune": {"learning_rate": [0.02, TOO_HIGH]}, "tuning_seeds": [7], "learning_rate": None}


@pytest.mark.slow
def test_a_search_passes_over_a_rate_at_which_training_diverges(run, tmp_path):
    table = tmp_path / "table.md"
    asked = {**ONE_TASK, **SEARCH, "recipes": {"2468": RECIPES["2468"]}, "seeds": [0]}
    result = run(**asked, tables=str(table))
    assert (result.status, result.open) == ("finished", 0)
    (found,) = result.found
    too_high = f"@learning_rate={TOO_HIGH}"
    assert found.chosen == "@learning_rate=0.02"
    assert found.diverged == {too_high: [7]}
    (one,) = [each for each in result.results if each.recipe == "2468" + too_high]
    assert (one.correct, one.marks, one.unanswered) == (0, "0" * one.total, one.total)
    assert one.diverged_at in (1, 2)
    (other,) = [each for each in result.results if each.recipe == "2468"]
    assert other.diverged_at is None
    assert (one.num_experts, one.trainable_parameters) == (other.num_experts, other.trainable_parameters)
    assert "0.0 (diverged)" in table.read_text(encoding="utf-8")
    assert run(**asked).found == result.found  # nothing is left, the record is read again
    assert len(run(**asked).results) == len(result.results)


@pytest.mark.slow
def test_a_seed_that_diverges_stays_in_the_mean_of_its_recipe(run, monkeypatch, tmp_path):
    original = FiniteLoss.on_log

    def spoil(self, args, state, control, logs=None, **kwargs):
        is_it = args.seed == 1 and "2468" in args.output_dir and state.global_step == 3
        return original(self, args, state, control, logs={**logs, "loss": float("nan")} if is_it else logs, **kwargs)

    monkeypatch.setattr(FiniteLoss, "on_log", spoil)
    tables = [tmp_path / "table.csv", tmp_path / "table.md"]
    result = run(**ONE_TASK, tables=",".join(map(str, tables)), keep_adapters=True)
    (one,) = [each for each in result.results if each.diverged_at]
    assert (one.key, one.diverged_at) == (("physics", "2468", 1), 3)
    rows = {row.recipe: row for row in result.rows}
    assert rows["2468"].diverged == [1]
    assert rows["lora"].diverged == []
    (healthy,) = [each for each in result.results if each.key == ("physics", "2468", 0)]
    assert rows["2468"].accuracy == pytest.approx(healthy.accuracy / 2)
    assert rows["2468"].seeds == rows["2468"].difference.seeds == 2
    lines = {line["recipe"]: line for line in csv.DictReader(io.StringIO(tables[0].read_text()))}
    assert (lines["2468"]["diverged_seeds"], lines["lora"]["diverged_seeds"]) == ("1", "")
    assert "2468 on physics diverged with seed 1: all answers count as wrong." in tables[1].read_text()
    assert one.seconds_training > 0


@pytest.mark.parametrize("scoring", ["likelihood", *slow("generate")])
def test_answers_that_are_not_finite_count_as_wrong(run, scoring):
    """Weights may be finite and what they compute is not: with huge ones the test after the last step says so."""
    settings = {"scoring": scoring, "recipes": {"lora": RECIPES["lora"]}, "learning_rate": TOO_HIGH, "max_steps": 1}
    result = run(**ONE_TASK, **settings, seeds=[0])
    (one,) = result.results
    assert (one.correct, one.diverged_at, one.steps) == (0, 1, 1)


@pytest.mark.slow
def test_a_signal_before_a_divergence_interrupts(run, monkeypatch):
    """The training would have saved a checkpoint and stopped, and has none of finite weights to save."""
    original = FiniteLoss.on_log

    def spoil(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        logs = {**logs, "loss": float("nan")} if state.global_step == 2 else logs
        return original(self, args, state, control, logs=logs, **kwargs)

    monkeypatch.setattr(FiniteLoss, "on_log", spoil)
    result = run(**ONE_TASK, recipes={"lora": RECIPES["lora"]})
    assert (result.status, result.open, result.results) == ("interrupted", 2, [])


@pytest.mark.parametrize(
    ("scoring", "said"),
    [("likelihood", "scores of sample .* are NaN"), *slow(("generate", "logits of an answer must be numbers"))],
)
def test_a_base_model_with_answers_that_are_not_finite_is_an_error(run, values, tmp_path, scoring, said):
    base = tmp_path / "base"
    shutil.copytree(values()["base_model"], base)

    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"].fill_(float("nan"))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MolaError, match=said):
        run(**ONE_TASK | {"evaluate_base": True}, scoring=scoring, base_model=str(base), seeds=[0])
    assert read(tmp_path / "out" / "compare.json")["runs"] == []

"""`mola compare`: the search for options."""

import os
import signal

import numpy as np
import pytest

from mola import MolaError
from mola.studies.comparison.compare import CompareOptions
from mola.studies.comparison.record import BASE
from mola.studies.comparison.search import _edges
from mola.training.callbacks import MetricsFile
from tests.grids import slow
from tests.studies.comparison.comparisons import RECIPES, read

ONE_TASK = {"tasks": {"physics": {"filters": {"topic": "physics"}}}}
RATES = [0.001, 0.02]
SEARCH = {"tune": {"learning_rate": RATES}, "tuning_seeds": [7, 8], "learning_rate": None, "max_steps": 2}


# ---------------------------------------------------------------------- the search


@pytest.mark.parametrize(("recipes", "tuning_seeds"), [(["2468"], [7]), *slow((["lora", "2468"], [7, 8]))], ids=str)
def test_each_recipe_gets_the_rate_that_was_best_for_it_on_other_seeds_and_questions(
    recipes, tuning_seeds, run, tmp_path
):
    search = SEARCH | {"tuning_seeds": tuning_seeds, "recipes": {name: RECIPES[name] for name in recipes}}
    result = run(**ONE_TASK, **search, seeds=[0])
    assert (result.status, result.open) == ("finished", 0)
    by_key = {each.key: each for each in result.results}
    for found in result.found:
        for rate in RATES:
            runs = [by_key["physics", f"{found.recipe}@learning_rate={rate}", seed] for seed in tuning_seeds]
            assert found.accuracies[f"@learning_rate={rate}"] == pytest.approx(np.mean([r.accuracy for r in runs]))
            assert {each.settings["learning_rate"] for each in runs} == {rate}
        best = max(found.accuracies, key=found.accuracies.get)
        assert found.chosen == best
        assert found.edges == ["learning_rate"]  # of two values both are at the edge
        one = by_key["physics", found.recipe, 0]
        assert f"@learning_rate={one.settings['learning_rate']}" == best
        assert one.fingerprints["test"] != runs[0].fingerprints["test"]
    assert {row.recipe for row in result.rows} == {*recipes, BASE}  # the search is in no table
    record = read(tmp_path / "out" / "compare.json")
    assert [each["chosen"] for each in record["search"]] == [each.chosen for each in result.found]
    # Nothing is left to do, and the choice is found again; the base model was asked other questions than the search.
    again = run(**ONE_TASK, **search, seeds=[0])
    assert again.found == result.found
    assert len(again.results) == len(result.results)


@pytest.mark.slow
def test_a_search_may_choose_checkpoints_by_its_own_questions(run):
    """Those are the evaluation data by default, and never those of the test."""
    result = run(
        **ONE_TASK,
        **SEARCH | {"tuning_seeds": [7]},
        seeds=[0],
        recipes={"lora": RECIPES["lora"]},
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    assert (result.status, len(result.found)) == ("finished", 1)


def test_every_combination_of_what_is_searched_for_is_a_candidate(values):
    tune = {"learning_rate": [0.001, 0.02], "weight_decay": [0.0, 0.1]}
    options = CompareOptions(**values(tune=tune, tuning_seeds=[7], learning_rate=None))
    assert len(options.candidates) == 4
    assert options.candidates["@learning_rate=0.001,weight_decay=0.1"] == {"learning_rate": 0.001, "weight_decay": 0.1}


def test_edges_are_named_for_options_with_ordered_values():
    tried = {
        f"@{rate},{rank},{name}": {"rate": rate, "r": rank, "name": name}
        for rate in (2, 1, 3)
        for rank in (4, 8)
        for name in "ab"
    }
    assert _edges(tried, "@2,4,a") == ["r"]
    assert _edges(tried, "@1,8,b") == ["rate", "r"]
    assert _edges({"@1": {"rate": 1}}, "@1") == []


@pytest.mark.slow
def test_a_search_that_is_stopped_goes_on(run, monkeypatch, tmp_path):
    asked = {**ONE_TASK, **SEARCH, "evaluate_base": False, "tuning_seeds": [7], "seeds": [0]}
    asked["recipes"] = {"lora": RECIPES["lora"]}
    asked["tables"] = str(tmp_path / "table.md")
    begun = []

    def stop_at_the_second(self, *args, **kwargs):
        begun.append(self)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsFile, "on_train_begin", stop_at_the_second)
    first = run(**asked)
    assert (first.status, first.open, first.found) == ("interrupted", 2, [])
    assert "2 runs are left: all numbers will change." in (tmp_path / "table.md").read_text()
    monkeypatch.undo()
    again = run(**asked)
    assert "| physics | lora |" in (tmp_path / "table.md").read_text()
    assert "are left" not in (tmp_path / "table.md").read_text()
    assert (again.status, again.open) == ("finished", 0)
    assert [each.recipe for each in again.found] == ["lora"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": {"learning_rate": 0.1}}, "`tune.learning_rate` must be a list of values"),
        ({"tune": {"seed": [1, 2]}}, "`seed` cannot be set in `tune`"),
        ({"tune": {"num-experts": ["2", "4"]}}, "`num_experts` cannot be set in `tune`"),
        ({"tune": {"r": [4, 8]}}, "`r` is set twice"),
        (
            {**SEARCH, "tuning_seeds": [1]},
            "`tuning_seeds` must be a non-empty list of distinct numbers .* any of `seeds`",
        ),
        ({**SEARCH, "tuning_split": "test"}, "`tuning_split` must not be `test_split`"),
        ({**SEARCH, "tuning_split": "nowhere"}, "must name the test data"),
    ],
)
def test_wrong_searches_are_refused(run, tmp_path, changes, message):
    with pytest.raises(MolaError, match=message):
        run(**changes)
    assert not list((tmp_path / "out").rglob("*.safetensors"))

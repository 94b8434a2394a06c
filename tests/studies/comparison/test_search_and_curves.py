"""`mola compare`: the search for options, tests on the way, what they are summed up to, power, pictures."""

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mola.studies.comparison.compare as compare_module
from mola import MolaError
from mola.evaluation.differences import MeanSquares
from mola.files.marked_pages import BEGIN, END
from mola.studies.comparison.compare import CompareOptions, compare
from mola.studies.comparison.curve import CURVE_FILE, over_the_training, read_curve, steps_to
from mola.studies.comparison.notes import power_line
from mola.studies.comparison.power import Components, seeds_needed
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.summary import AT_END, OVER_TRAINING
from mola.studies.comparison.tuning import Power, _edges, found_by_search
from mola.training.callbacks import MetricsFile
from tests.grids import slow
from tests.studies.comparison.comparisons import RECIPES, read

ONE_TASK = {"tasks": {"physics": {"filters": {"topic": "physics"}}}}
RATES = [0.001, 0.02]
SEARCH = {"tune": {"learning_rate": RATES}, "tuning_seeds": [7, 8], "learning_rate": None, "max_steps": 2}


# ---------------------------------------------------------------------- the search


@pytest.mark.parametrize("tuning_seeds", [[7], *slow([7, 8])], ids=str)
def test_each_recipe_gets_the_rate_that_was_best_for_it_on_other_seeds_and_questions(tuning_seeds, run, tmp_path):
    search = SEARCH | {"tuning_seeds": tuning_seeds}
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
        assert (found.edges, found.measure) == (["learning_rate"], AT_END)  # of two values both are at the edge
        one = by_key["physics", found.recipe, 0]
        assert f"@learning_rate={one.settings['learning_rate']}" == best
        assert one.fingerprints["test"] != runs[0].fingerprints["test"]
    assert {row.recipe for row in result.rows} == {*RECIPES, BASE}  # the search is in no table
    record = read(tmp_path / "out" / "compare.json")
    assert [each["chosen"] for each in record["search"]] == [each.chosen for each in result.found]
    assert len(result.power) == (len(tuning_seeds) > 1)
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


def test_where_tests_are_on_the_way_the_whole_training_decides(values):
    """The first rate ends higher, the second is higher for longer."""
    asked = {**ONE_TASK, **SEARCH, "recipes": {"lora": RECIPES["lora"]}, "max_steps": 8}
    marks = {0.001: ("0000", "1110"), 0.02: ("1100", "1100")}  # of four questions, after 4 steps and after 8
    unknown = dict.fromkeys(("unanswered", "trainable_parameters", "eval_loss", "fingerprints", "versions", "machine"))
    unknown |= dict.fromkeys(("seconds_training", "seconds_testing", "settings"))
    results = [
        Result(
            *("physics", f"lora@learning_rate={rate}", seed),
            **unknown,
            accuracy=end.count("1") / 4,
            correct=end.count("1"),
            total=4,
            marks=end,
            num_experts=[1],
            steps=8,
            curve=[(4, before)],
        )
        for rate, (before, end) in marks.items()
        for seed in SEARCH["tuning_seeds"]
    ]
    (found,) = found_by_search(CompareOptions(**values(**asked, test_every=4)), results)
    assert (found.chosen, found.measure) == ("@learning_rate=0.02", OVER_TRAINING)
    assert found.accuracies == {"@learning_rate=0.001": 0.375, "@learning_rate=0.02": 0.5}
    (at_end,) = found_by_search(CompareOptions(**values(**asked)), results)
    assert (at_end.chosen, at_end.measure) == ("@learning_rate=0.001", AT_END)
    assert found_by_search(CompareOptions(**values(**asked)), results[1:]) == []


def test_components_are_those_of_the_mean_squares():
    squares = [(MeanSquares(6.0, 2.0, 2.0), (2, 3)), (MeanSquares(6.0, 8.0, 2.0), (2, 3))]
    assert Components.pooled(squares[:1]) == Components(4 / 3, 0.0, 2.0)
    assert Components.pooled(squares) == Components(4 / 3, 3 / 2, 2.0)


def test_an_edge_is_named_for_each_option_whose_values_have_an_order():
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
def test_a_probe_in_the_search_has_the_same_options(run, tmp_path):
    asked = {**ONE_TASK, **SEARCH, "evaluate_base": False, "tuning_seeds": [7], "seeds": [0]}
    probed = {"allocate": {"method": "redundancy", "budget": 12, "probe": "even"}, "r": "4"}
    result = run(**asked, recipes={"even": {"num_experts": "3,", "r": "4"}, "probed": probed})
    folder = tmp_path / "out" / "physics"
    for name, seed in [("probed", 0), *((f"probed@learning_rate={rate}", 7) for rate in RATES)]:
        made = read(folder / f"{name}-seed-{seed}.json")
        (one,) = [each for each in result.results if (each.recipe, each.seed) == (name, seed)]
        assert one.num_experts == made["num_experts"]
    rates = {each.recipe: each.settings["learning_rate"] for each in result.results if each.recipe.startswith("even@")}
    assert rates == {f"even@learning_rate={rate}": rate for rate in RATES}


@pytest.mark.slow
def test_a_search_that_another_process_finishes_meanwhile_counts(run, monkeypatch, tmp_path):
    asked = {**ONE_TASK, **SEARCH, "evaluate_base": False, "tuning_seeds": [7], "seeds": [0]}
    asked["recipes"] = {"lora": RECIPES["lora"]}
    run(**asked)
    record = tmp_path / "out" / "compare.json"
    content = read(record)
    searched = [each for each in content["runs"] if "@" in each["recipe"]]
    for each in searched:  # so that the second value is chosen, whatever the tiny model does
        each["marks"] = ("1" if each["recipe"].endswith("0.02") else "0") * each["total"]
        each["correct"] = each["marks"].count("1")
        each["accuracy"] = each["correct"] / each["total"]
    shutil.rmtree(tmp_path / "out" / "physics" / "lora")
    record.write_text(json.dumps({**content, "runs": searched[:-1]}))
    original, calls = compare_module.check_runs, []

    def check_runs(options, runs):
        calls.append(runs)
        found = original(options, runs)
        if len(calls) == 2:  # the record was read before
            record.write_text(json.dumps({**content, "runs": searched}))
        return found

    monkeypatch.setattr(compare_module, "check_runs", check_runs)
    result = run(**asked)
    assert [each.chosen for each in result.found] == ["@learning_rate=0.02"]
    (fresh,) = [each for each in result.results if each.recipe == "lora"]
    assert fresh.settings["learning_rate"] == 0.02
    monkeypatch.undo()
    assert run(**asked).status == "finished"


@pytest.mark.slow
def test_a_search_that_is_stopped_goes_on(run, monkeypatch, tmp_path):
    asked = {**ONE_TASK, **SEARCH, "evaluate_base": False, "tuning_seeds": [7], "seeds": [0]}
    asked["recipes"] = {"lora": RECIPES["lora"]}
    page, before = tmp_path / "page.md", f"# Page\n\n{BEGIN}\nThere is no result yet.\n{END}\n"
    page.write_text(before)
    asked["tables"] = f"{page},{tmp_path / 'table.md'}"
    begun = []

    def stop_at_the_second(self, *args, **kwargs):
        begun.append(self)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsFile, "on_train_begin", stop_at_the_second)
    first = run(**asked)
    assert (first.status, first.open, first.found) == ("interrupted", 2, [])
    assert page.read_text() == before, "a page holds results only"
    assert "2 runs are left: all numbers will change." in (tmp_path / "table.md").read_text()
    monkeypatch.undo()
    again = run(**asked)
    assert "### physics" in page.read_text()
    assert "are left" not in (tmp_path / "table.md").read_text()
    assert (again.status, again.open) == ("finished", 0)
    assert [each.recipe for each in again.found] == ["lora"]
    assert again.power == []  # with one tuning seed nothing is known of others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": {"learning_rate": 0.1}}, "`tune.learning_rate` must be a list of values"),
        ({"tune": {"learning_rate": []}}, "`tune.learning_rate` must be a list of values"),
        ({"tune": {"seed": [1, 2]}}, "`tune` cannot have `seed`"),
        ({"tune": {"num_experts": ["2", "4"]}}, "`tune` cannot have `num_experts`"),
        ({"tune": {"learning_rat": [1, 2]}}, "no option of this command"),
        ({"tune": {"r": [4, 8]}}, "`r` is in `tune`, and set by"),
        ({"tune": {"lora-dropout": [0.1, 0.2]}}, r"`lora_dropout` \(0.0\) is in `tune`, which chooses it"),
        ({"tune": {"num-experts": ["2", "4"]}}, "`tune` cannot have `num_experts`"),
        (
            {**SEARCH, "tuning_seeds": [1]},
            "`tuning_seeds` must be different numbers, .* none of `seeds`",
        ),
        ({**SEARCH, "tuning_split": "test"}, "`tuning_split` must not be `test_split`"),
        ({**SEARCH, "tuning_split": "nowhere"}, "must name the test data"),
        ({"test_every": 0}, "`test_every` must be at least 1"),
        ({"target_accuracy": 0.5}, "`target_accuracy` .* needs `test_every`"),
        ({"target_accuracy": 80, "test_every": 2}, "`target_accuracy` must be a fraction of 1"),
        ({"margin": 0}, "`margin` must be above 0"),
        ({"plots": "curves.pdf"}, "`plots` must be files that end in .png, .svg"),
    ],
)
def test_wrong_searches_are_refused(run, tmp_path, changes, message):
    with pytest.raises(MolaError, match=message):
        run(**changes)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


# ---------------------------------------------------------------------- curves


def test_tests_on_the_way_change_nothing_and_make_a_curve(run, values, tmp_path):
    asked = {**ONE_TASK, "evaluate_base": True, "seeds": [0]}
    plain = run(**asked)
    options = {**values(**asked, test_every=1, target_accuracy=0.01), "output_dir": str(tmp_path / "curves")}
    pictures = [tmp_path / "curves.png", tmp_path / "curves.svg"]
    page = tmp_path / "page.html"
    result = compare(CompareOptions(**options, plots=",".join(map(str, pictures)), tables=str(page)))
    marks = {each.key: each.marks for each in plain.results}
    for each in result.results:
        assert each.marks == marks[each.key]
        if each.recipe in RECIPES:
            assert [step for step, _ in each.curve] == [1, 2, 3]
            assert each.steps == 4
    rows = {(row.measure, row.recipe): row for row in result.rows}
    one = [each for each in result.results if each.recipe == "2468"]
    curves = [[*(m.count("1") / len(m) for _, m in each.curve), each.accuracy] for each in one]
    assert rows[AT_END, "2468"].mean.value == pytest.approx(np.mean([curve[-1] for curve in curves]))
    expected = np.mean([np.mean([(a + b) / 2 for a, b in pairwise(c)]) for c in curves])
    assert rows[OVER_TRAINING, "2468"].mean.value == pytest.approx(expected)
    assert len(rows[OVER_TRAINING, "2468"].steps_to_target) == 1
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    ElementTree.fromstring(pictures[1].read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    assert "physics, over the training" in text
    assert "steps to target" in text
    assert text.count("Learning curve of") == 1  # of the one that is not the reference, beside it
    assert text.count('<polygon class="band') == 0  # one seed says nothing about others
    assert "mean over seeds; no band: one seed" in text
    # The same folders do for the same tests only.
    (tmp_path / "curves" / "compare.json").unlink()
    (tmp_path / "curves" / "physics" / "lora" / "seed-0" / CURVE_FILE).unlink()
    with pytest.raises(MolaError, match="without the tests on the way that `test_every` 1 asks for"):
        compare(CompareOptions(**options))


@pytest.mark.slow
def test_tests_on_the_way_ask_the_weights_that_an_optimiser_gives(run, monkeypatch):
    """Schedule-free ones train others."""
    asked = []
    monkeypatch.setattr(torch.optim.AdamW, "eval", lambda self: asked.append(self), raising=False)
    run(**ONE_TASK, recipes={"lora": RECIPES["lora"]}, seeds=[0], test_every=1, evaluate_base=False)
    assert len(asked) >= 4  # at three tests, and at the end


def test_a_training_that_goes_on_keeps_its_tests(run, tmp_path, monkeypatch):
    asked = {
        **ONE_TASK,
        "recipes": {"lora": RECIPES["lora"]},
        "seeds": [0],
        "test_every": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "evaluate_base": False,
    }
    ended = []

    def stop_after_the_second(self, args, state, control, **kwargs):
        if state.global_step == 2 and not ended:
            ended.append(state.global_step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsFile, "on_step_end", stop_after_the_second, raising=False)
    assert run(**asked).status == "interrupted"
    curve = tmp_path / "out" / "physics" / "lora" / "seed-0" / CURVE_FILE
    before = curve.read_text(encoding="utf-8").splitlines()
    state = curve.parent / "checkpoint-2" / "trainer_state.json"
    written = state.stat().st_mtime_ns
    result = run(**asked)
    assert result.status == "finished"
    assert state.stat().st_mtime_ns == written  # it did not begin again
    lines = curve.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert lines[: len(before)] == before


@given(st.lists(st.integers(0, 1), min_size=2, max_size=6))
def test_the_mean_over_a_training_lies_between_its_points(marks):
    curve = [(10 * (index + 1), np.array([float(mark)])) for index, mark in enumerate(marks)]
    (mean,) = over_the_training(curve)
    assert min(marks) <= mean <= max(marks)
    if len(marks) == 3:
        assert mean == pytest.approx((marks[0] + 2 * marks[1] + marks[2]) / 4)


def test_steps_to_an_accuracy():
    curve = [(10, 0.2), (20, 0.6), (30, 0.4), (40, 0.9)]
    assert steps_to(0.4, curve) == 15
    assert steps_to(0.1, curve) == 10
    assert steps_to(0.9, curve) == 40
    assert steps_to(0.95, curve) is None


# ---------------------------------------------------------------------- power


def test_as_many_seeds_as_the_power_says_find_the_difference():
    """Simulated: the number of seeds found gives a power of 0.8, about."""
    parts = Components(seeds=0.05**2, questions=0.1**2, rest=0.2)
    needed = seeds_needed(0.08, parts, 300, 1, 0.8, 0.95)
    assert needed is not None
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        between = 0.05 * generator.normal(size=needed) + (0.2 / 300) ** 0.5 * generator.normal(size=needed)
        values = 0.08 + between + 0.1 * generator.normal() / 300**0.5
        error = values.std(ddof=1) / needed**0.5
        found += values.mean() / error > 2.0 + 2.6 / needed  # roughly the two-sided bound of t
    assert 0.7 * 300 <= found <= 0.95 * 300
    assert seeds_needed(0.04, parts, 300, 1, 0.8, 0.95) > needed
    assert seeds_needed(0.08, parts, 300, 10, 0.8, 0.95) > needed


def test_no_number_of_seeds_replaces_questions():
    parts = Components(seeds=0.0, questions=0.25, rest=0.0)
    assert seeds_needed(0.01, parts, 20, 1, 0.8, 0.95) is None
    # Among 13 recipes no interval over 120 questions excludes less than 5.08 points, however little varies.
    steady = Components(seeds=0.01**2, questions=0.0, rest=0.001)
    assert seeds_needed(0.05, steady, 120, 13, 0.8, 0.95) is None
    assert seeds_needed(0.07, steady, 120, 13, 0.8, 0.95) < 10
    power = Power("physics", margin=5.0, seeds=10, questions=200, needed=12, seed_deviation=4.0)
    assert "5 points at the end with a probability of 80 %, it takes 12 seeds on 200 questions" in power_line(power)
    assert "5 points over the training with" in power_line(replace(power, measure=OVER_TRAINING))
    assert "1,000 seeds are not enough: it takes more of them, or more questions, on 200" in power_line(
        replace(power, needed=None)
    )


def test_options_of_a_search_without_one_are_warned_of(values, caplog):
    CompareOptions(**values(tuning_seeds=[7], tuning_split="dev", margin=2.0))
    for name in ("tuning_seeds", "tuning_split", "margin"):
        assert f"`{name}` is not used: it is about a search" in caplog.text


def test_a_line_that_was_cut_off_is_no_test_on_the_way(tmp_path):
    lines = [{"step": step, "marks": "10", "seconds": 1.5} for step in (2, 4)]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / CURVE_FILE).write_text(text[:-9], encoding="utf-8")
    assert read_curve(tmp_path) == ([(2, "10")], 1.5)

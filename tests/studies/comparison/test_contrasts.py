"""`contrasts` of `mola compare`: recipes compared with each other, besides the reference."""

import csv
import io
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from mola import MolaError
from mola.evaluation.differences import paired_differences
from mola.studies.comparison.contrasts import contrasts
from mola.studies.comparison.marks import as_numbers
from mola.studies.comparison.outputs import Outcome, page
from mola.studies.comparison.plots import bands, draw, has_band
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.summary import ALL_TASKS, AT_END, OVER_TRAINING, summarize
from mola.studies.comparison.tables import comma_separated, terminal_tables
from tests.reporting.pages import Page
from tests.studies.comparison.comparisons import RECIPES, TASKS, read

PAIRS = [("top", "even"), ("top", "bottom")]
CHANCES = {"lora": 0.5, "even": 0.5, "top": 0.8, "bottom": 0.4}


def result(task, recipe, seed, generator, curve):
    marks = ["".join("01"[int(each)] for each in generator.random(60) < CHANCES[recipe]) for _ in range(2)]
    right = marks[1].count("1")
    places = ("eval_loss", "seconds_training", "seconds_testing", "settings", "fingerprints", "versions", "machine")
    known = {"accuracy": right / 60, "correct": right, "total": 60, "unanswered": 0, "marks": marks[1], "steps": 8}
    known |= {"trainable_parameters": 1000, "num_experts": [2, 4], "curve": [(4, marks[0])] if curve else []}
    return Result(task, recipe, seed, **known, **dict.fromkeys(places))


def results(tasks=("one",), curve=False, seeds=range(4)):
    generator = np.random.default_rng(0)
    return [result(task, recipe, seed, generator, curve) for task in tasks for seed in seeds for recipe in CHANCES]


def marks(found, task, recipe):
    return np.stack([as_numbers(each.marks) for each in found if (each.task, each.recipe) == (task, recipe)])


def test_pairs_are_compared_as_with_a_reference_and_adjusted_for_their_number():
    found = results()
    top, bottom = contrasts(found, PAIRS, ["one"])
    assert [(each.task, each.measure, each.recipe, each.other) for each in (top, bottom)] == [
        ("one", AT_END, *pair) for pair in PAIRS
    ]
    alone = paired_differences({"top": marks(found, "one", "top")}, marks(found, "one", "even"), 2)["top"]
    assert top.difference == alone
    assert (top.difference.verdict, bottom.difference.verdict) == ("better", "better")
    (back,) = contrasts(found, [("even", "top")], ["one"])
    assert back.difference.verdict == "worse"
    assert back.difference.value == pytest.approx(-top.difference.value)
    assert back.difference.p_adjusted == pytest.approx(top.difference.p_adjusted / 2)


def test_every_measure_and_task_has_its_own_and_only_common_seeds_count():
    found = [each for each in results(("one", "two"), curve=True) if (each.recipe, each.seed) != ("even", 3)]
    tables = contrasts(found, PAIRS, ["one", "two"])
    assert [(each.measure, each.task) for each in tables[::2]] == [
        (measure, task) for measure in (AT_END, OVER_TRAINING) for task in ("one", "two", ALL_TASKS)
    ]
    assert {(each.other, each.difference.seeds) for each in tables} == {("even", 3), ("bottom", 4)}
    assert contrasts([each for each in found if each.recipe != "top"], PAIRS, ["one", "two"]) == []
    assert contrasts(found, [], ["one", "two"]) == []


def test_they_stand_in_every_form_of_the_tables():
    found = results(curve=True)
    rows, pairs = summarize(found, list(CHANCES), ["one"], "lora"), contrasts(found, PAIRS, ["one"])
    outcome = Outcome(rows, "lora", contrasts=pairs)
    text = outcome.markdown()
    assert text.startswith(Outcome(rows, "lora").markdown().rstrip())
    assert "### one: recipes with each other" in text
    assert "### one, over the training: recipes with each other" in text
    points = f"{100 * pairs[0].difference.value:+.1f}"
    assert f"| top | even | 4 | {points} |" in text
    lines = list(csv.DictReader(io.StringIO(comma_separated(rows, pairs))))
    assert [line["recipe"] for line in lines[-4:]] == ["top - even", "top - bottom"] * 2
    assert float(lines[-4]["difference"]) == pairs[0].difference.value
    assert lines[-4]["verdict"] == "better"
    assert len(terminal_tables(rows, "lora", pairs)) == len(terminal_tables(rows, "lora")) + 2
    titles = [node.text for node in Page(page(outcome)).root.all("h2")]
    assert titles[-2:] == ["one: recipes with each other", "one, over the training: recipes with each other"]


def test_they_are_drawn():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, the extra `plot`")
    found = results()
    rows, pairs = summarize(found, list(CHANCES), ["one"], "lora"), contrasts(found, PAIRS, ["one"])
    plain, more = (draw(found, rows, ["one"], list(CHANCES), "svg", each).decode() for each in ((), pairs))
    assert "top - even" not in plain
    assert "recipes with each other" in more


def test_curves_stand_beside_the_reference_or_alone_with_bands_where_seeds_differ():
    found = results(curve=True)
    for names, charts in ((["lora", "top"], 1), (["lora", "top", "even"], 2), (["lora"], 1)):
        some = [each for each in found if each.recipe in names]
        curves = {"one": bands(some, "one", names)}
        text = page(Outcome(summarize(some, names, ["one"], "lora"), "lora", curves=curves))
        assert text.count("Learning curve of") == charts
        assert all(map(has_band, curves["one"].values()))
        assert text.count('<polygon class="band') == (1 if len(names) == 1 else 2 * charts)
        assert "band: 95 % interval over seeds" in text


@pytest.mark.slow
def test_a_finished_comparison_takes_them_up(run, tmp_path):
    one = {"tasks": {"physics": TASKS["physics"]}, "evaluate_base": False, "max_steps": 1}
    first = run(**one)
    assert first.contrasts == []
    again = run(**one, contrasts={"2468": ["lora"]})
    assert [asdict(each) for each in again.results] == [asdict(each) for each in first.results]
    (only,) = again.contrasts
    (row,) = [row for row in again.rows if row.recipe == "2468"]
    assert only.difference == row.difference
    (written,) = read(tmp_path / "out" / "compare.json")["summary"]["contrasts"]
    assert (written["recipe"], written["other"]) == ("2468", "lora")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"2468": "even"}, f"`contrasts` must name recipes, {', '.join(RECIPES)}: got 'even'."),
        ({"2468": 5555}, "`contrasts` must name recipes, .*: got 5555."),
        ({"2468": "2468"}, "`contrasts` must be pairs of different recipes, each once: got '2468' and '2468'."),
        ({"2468": "lora", "lora": ["2468"]}, "`contrasts` must be pairs of different recipes, each once"),
        (["2468", "lora"], "`contrasts` must be a mapping"),
    ],
)
def test_wrong_pairs_are_refused(run, given, message):
    with pytest.raises(MolaError, match=message):
        run(contrasts=given)


@pytest.mark.parametrize(
    ("change", "begins"),
    [
        ({}, True),
        ({"dtype": "bfloat16"}, False),
        *(({"settings": {name: value}}, False) for name, value in [("load_in_4bit", True), ("scoring", "likelihood")]),
        ({"settings": {"max_new_tokens": 64}}, False),
    ],
    ids=str,
)
def test_curves_begin_with_the_base_that_was_tested(change, begins):
    known = {"task": "one", "base_model": "a", "dtype": "float32", "fingerprints": {}, "steps": 8, "marks": "11"}
    base = SimpleNamespace(recipe=BASE, accuracy=0.25, settings={"load_in_4bit": False, "batch_size": 8}, **known)
    run = SimpleNamespace(recipe="lora", curve=[(4, "10")], **{**known, "settings": {"r": 4}, **change})
    found = bands([base, run], "one", ["lora"])["lora"]
    assert [point[:2] for point in found] == [(0, 0.25)] * begins + [(4, 0.5), (8, 1.0)]

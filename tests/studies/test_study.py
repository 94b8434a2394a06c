"""The studies by `mola compare` are what their records in studies/ say, and the records are of the whole recipes."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from mola.files.marked_pages import BEGIN, END
from mola.studies.comparison.contrasts import contrasts
from mola.studies.comparison.notes import effort_line
from mola.studies.comparison.options import pairs_of
from mola.studies.comparison.outputs import Outcome
from mola.studies.comparison.record import BASE, read_results
from mola.studies.comparison.summary import summarize
from mola.studies.comparison.tuning import Found, Power

ROOT = Path(__file__).parents[2]
PAGES = {
    "sample_efficiency.yaml": "sample-efficiency.md",
    "harder_questions.yaml": "harder-questions.md",
    "real_text.yaml": "real-text.md",
}


@pytest.fixture(params=PAGES, scope="module")
def recipe(request):
    found = yaml.safe_load((ROOT / "recipes" / request.param).read_text(encoding="utf-8"))
    return {**found, "page": (ROOT / "docs" / PAGES[request.param]).read_text(encoding="utf-8")}


@pytest.fixture(scope="module")
def record(recipe):
    """The record, finished or not; a study that is not has no result on its page."""
    path = ROOT / recipe["record"]
    if not path.exists() or content(path)["status"] != "finished":
        assert "There is no result yet." in recipe["page"]
    if not path.exists():
        pytest.skip("no run of this study is in the repository yet, and its page says so")
    return path


@pytest.fixture
def finished(record):
    if content(record)["status"] != "finished":
        pytest.skip("this study is not finished yet, and its page says so")
    return record


def content(record):
    return json.loads(record.read_text(encoding="utf-8"))


def rows(recipe, record):
    return summarize(
        read_results(record),
        list(recipe["recipes"]),
        list(recipe["tasks"]),
        recipe["reference"],
        recipe.get("target_accuracy"),
    )


def test_every_run_of_the_recipe_is_in_the_record(recipe, record):
    is_finished = content(record)["status"] == "finished"
    expected = {
        (task, name, seed) for task in recipe["tasks"] for name in recipe["recipes"] for seed in recipe["seeds"]
    } | {(task, BASE, 0) for task in recipe["tasks"]}
    results = [result for result in read_results(record) if not result.key.candidate]
    found = {(result.task, result.recipe, result.seed) for result in results}
    assert found == expected if is_finished else found < expected
    tested = {len(result.marks) for result in results}
    assert len(tested) <= 1
    assert not tested or "test_limit" not in recipe or tested == {recipe["test_limit"]}


def test_the_search_is_in_the_record(recipe, finished):
    tried = {result.key for result in read_results(finished) if result.key.candidate}
    rates = recipe.get("tune", {}).get("learning_rate", [])
    assert tried == {
        (task, f"{name}@learning_rate={rate}", seed)
        for task in recipe["tasks"]
        for name in recipe["recipes"]
        for rate in rates
        for seed in recipe.get("tuning_seeds", [])
    }


def pairs(recipe, record):
    return contrasts(read_results(record), pairs_of(recipe.get("contrasts", {}), recipe["recipes"]), [*recipe["tasks"]])


def test_the_summary_follows_from_the_marks(recipe, record):
    summary = content(record)["summary"]
    again = json.loads(json.dumps([asdict(row) for row in rows(recipe, record)]))
    assert rounded(summary["rows"]) == rounded(again)
    again = json.loads(json.dumps([asdict(each) for each in pairs(recipe, record)]))
    assert rounded(summary.get("contrasts", [])) == rounded(again)


def rounded(value):
    """Nine digits after the point: versions of scipy may differ in the last ones."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 9) if isinstance(value, float) else value


def test_the_page_has_the_tables(recipe, finished):
    said = content(finished)
    text = Outcome(
        rows(recipe, finished),
        recipe["reference"],
        [Found(**each) for each in said.get("search", [])],
        [Power(**each) for each in said.get("power", [])],
        effort=effort_line(read_results(finished)),
        contrasts=pairs(recipe, finished),
    ).markdown()
    assert recipe["page"].partition(BEGIN)[2].partition(END)[0].strip() == text.strip()


def test_what_the_page_of_real_text_says_of_its_curves():
    """Which runs gave every sentence one answer after 400 steps, and how the runs of one seed were after 200."""
    results = [each for each in read_results(ROOT / "studies" / "real_text.json") if not each.key.candidate]
    after = {each.key: dict(each.curve) for each in results if each.recipe != BASE}
    ((same, count),) = Counter(curve[400] for curve in after.values()).most_common(1)
    assert (count, round(100 * same.count("1") / len(same), 1)) == (17, 69.1)
    assert [key.recipe for key, curve in after.items() if curve[400] == same].count("lora_r43") == 1
    right = [curve[200].count("1") / len(curve[200]) for key, curve in after.items() if key.seed == 2]
    assert [round(100 * each) for each in sorted(right)] == [34, 37, 42, 63]

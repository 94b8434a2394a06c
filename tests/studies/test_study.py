"""The study in docs/study.md is what its record in studies/ says, and the record is of the whole recipe."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from mola.studies.comparison.record import BASE, read_results
from mola.studies.comparison.summary import summarize
from mola.studies.comparison.tables import markdown

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "studies" / "allocation.json"


@pytest.fixture(scope="module")
def recipe():
    return yaml.safe_load((ROOT / "recipes" / "study.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(recipe):
    return summarize(read_results(RECORD), list(recipe["recipes"]), list(recipe["tasks"]), recipe["reference"])


def test_every_run_of_the_recipe_is_in_the_record(recipe):
    expected = {
        (task, name, seed) for task in recipe["tasks"] for name in recipe["recipes"] for seed in recipe["seeds"]
    } | {(task, BASE, 0) for task in recipe["tasks"]}
    results = read_results(RECORD)
    assert {(result.task, result.recipe, result.seed) for result in results} == expected
    assert {len(result.marks) for result in results} == {recipe["test_limit"]}
    assert ROOT / recipe["record"] == RECORD


def test_the_summary_follows_from_the_marks(rows):
    content = json.loads(RECORD.read_text(encoding="utf-8"))
    assert content["status"] == "finished"
    assert rounded(content["summary"]["rows"]) == rounded(json.loads(json.dumps([asdict(row) for row in rows])))


def rounded(value):
    """Nine digits after the point: versions of scipy may differ in the last ones."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 9) if isinstance(value, float) else value


def test_the_page_has_the_table(recipe, rows):
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    for line in markdown(rows, recipe["reference"]).splitlines():
        assert line in page.splitlines()

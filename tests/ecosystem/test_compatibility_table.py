"""The table of docs/reference/compatibility.md names the cells that have tests, no others. Only collection runs."""

import importlib.util
from pathlib import Path

import pytest

from tests.ecosystem.families import FAMILIES

PATH = Path(__file__).resolve().parents[2] / "scripts" / "make_compatibility_table.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_compatibility_table", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_family_has_a_row_and_a_model(script):
    assert list(script.FAMILIES) == list(FAMILIES)


def test_the_table_names_the_cells_that_have_tests(script):
    recorder = script.collect()
    have_tests = {cell for cells in recorder.cells.values() for cell in cells}
    nothing = (script.UNTESTED, script.NOTHING_TO_TEST)
    named = {cell for cell, value in script.read_table().items() if value not in nothing}
    # Files that need a package which is not here have no tests to collect.
    missing = set() if recorder.left_out else named - have_tests
    assert (have_tests - named, missing) == (set(), set()), f"run {PATH.name}"


def test_the_worst_test_of_a_cell_is_what_it_says(script):
    recorder = script.Recorder()
    cells = [script.Cell("llama", "train"), script.Cell("opt", "train"), script.Cell("phi", "train")]
    recorder.cells = {"a": cells, "b": cells[:2], "c": cells[:1], "never ran": [script.Cell("t5", "train")]}
    recorder.outcomes.update({"a": {"passed"}, "b": {"passed", "skipped"}, "c": {"passed", "failed"}})
    expected = ["fails", "skipped here", "yes", "fails"]
    assert list(recorder.result().values()) == expected
    table = script.render(recorder.result())
    assert "| Phi | not tested here | yes | not tested here |" in table
    assert table.count("fails") == 2

"""Data and commands of small comparisons."""

import pytest

from mola.data.prepare import PrepareOptions, prepare
from mola.studies.comparison.compare import CompareOptions, compare
from tests.studies.comparison.comparisons import RECIPES, SETTINGS, TASKS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Generated questions on five topics, 8 of each to train on and 8 to test with."""
    folder = tmp_path_factory.mktemp("questions") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=40, validation_size=10, test_size=40))
    return folder / "dataset.hf"


@pytest.fixture
def values(tiny_model_dir, data, tmp_path):
    def build(**changes):
        chosen = {
            "base_model": str(tiny_model_dir),
            "data": str(data),
            "output_dir": str(tmp_path / "out"),
            "tasks": TASKS,
            "recipes": RECIPES,
            **SETTINGS,
            **changes,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    return build


@pytest.fixture
def run(values, tiny_model_dir):
    def compare_with(**changes):
        return compare(CompareOptions(**values(**changes)))

    compare_with.base_model = tiny_model_dir
    return compare_with

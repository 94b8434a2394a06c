"""Data, commands and one finished example of small comparisons."""

import pytest

from mola.data.prepare import PrepareOptions, prepare
from mola.studies.comparison.compare import CompareOptions, compare
from tests.studies.comparison.comparisons import RECIPES, SETTINGS, TASKS


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    """Generated questions on five topics, 8 of each to train on and 8 to test with."""
    folder = tmp_path_factory.mktemp("questions") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=40, validation_size=10, test_size=40))
    return folder / "dataset.hf"


@pytest.fixture(scope="package")
def made():
    """What `whole` returns, once it is made."""
    return []


# Made within a module, where `one_thread` holds: with more threads the last bits could be others.
@pytest.fixture(scope="module")
def whole(made, tiny_model_dir, data, tmp_path_factory):
    """The comparison that nobody stopped, made once: folder and result; not to be changed."""
    if not made:
        folder = tmp_path_factory.mktemp("whole") / "out"
        options = {"base_model": str(tiny_model_dir), "data": str(data), "output_dir": str(folder), **SETTINGS}
        made.append((folder, compare(CompareOptions(**options, tasks=TASKS, recipes=RECIPES))))
    return made[0]


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
def run(values):
    return lambda **changes: compare(CompareOptions(**values(**changes)))

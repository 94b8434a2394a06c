"""Questions on five topics, and short sequences of trainings and tests on them."""

import shutil
from pathlib import Path

import pytest

from mola import ContinualOptions, continual
from mola.data.prepare import PrepareOptions, prepare
from mola.training.callbacks import MetricsFile
from tests.studies.continual_learning.sequences import SETTINGS, STAGES


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    """Generated questions on five topics, 8 of each to train on and 8 to test with."""
    folder = tmp_path_factory.mktemp("questions") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=40, validation_size=10, test_size=40))
    return folder / "dataset.hf"


@pytest.fixture(scope="package")
def base_model(tiny_model_dir, tmp_path_factory):
    """A copy of the tiny model that a test may take the weights away from."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture
def values(base_model, data, tmp_path):
    """Builds the options of a short sequence, as a mapping; options given replace or extend them."""

    def build(**changes):
        chosen = {
            "base_model": str(base_model),
            "data": str(data),
            "output_dir": str(tmp_path / "run"),
            "stages": STAGES,
            **SETTINGS,
            **changes,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    return build


@pytest.fixture
def run(values):
    """Runs a sequence in Python."""
    return lambda **changes: continual(ContinualOptions(**values(**changes)))


@pytest.fixture(scope="package")
def made():
    """What `whole` returns, once it is made."""
    return []


# Made within a module, where `one_thread` holds: with more threads the last bits could be others.
@pytest.fixture(scope="module")
def whole(made, base_model, data, tmp_path_factory):
    """The sequence that nobody stopped, made once: folder and result."""
    if not made:
        folder = tmp_path_factory.mktemp("whole") / "run"
        options = {"base_model": str(base_model), "data": str(data), "output_dir": str(folder), **SETTINGS}
        made.append((folder, continual(ContinualOptions(**options, stages=STAGES, evaluate_base=True))))
    return made[0]


@pytest.fixture
def at_step(monkeypatch):
    """Do something once, right after a step of a stage was logged."""

    def arrange(folder, step, action):
        original = MetricsFile.on_log
        waiting = [action]

        def on_log(self, args, state, control, logs=None, **kwargs):
            original(self, args, state, control, logs=logs, **kwargs)
            if self.path.parent.name == folder and state.global_step == step and waiting:
                waiting.pop()()

        monkeypatch.setattr(MetricsFile, "on_log", on_log)

    return arrange

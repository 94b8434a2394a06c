"""YAML: tasks and recipes."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mola import MolaError
from mola.allocation.allocate import AllocateOptions
from mola.data.tasks import Task, load_task, task_names
from mola.data.tasks.loading import resources
from mola.models.plan import PlanOptions
from mola.options.parsing import convert, parse, read_recipe
from mola.training.train import TrainOptions
from tests.fuzz.checking import fuzz, survives
from tests.fuzz.documents import YAML_TEXTS, changed, files, values

TASK = yaml.safe_load(resources.files("mola.data.tasks").joinpath("scienceqa.yaml").read_text("utf-8"))
WORDS_TASK = yaml.safe_load(resources.files("mola.data.tasks").joinpath("mrpc.yaml").read_text("utf-8"))
ROW = {"question": "Why?", "choices": ["a", "b"], "answer": 1, "hint": "", "subject": "x", "id": "7"}
PLAN = {"base_model": "m", "num_experts": [1, 2], "r": 8, "top_k": "2", "target_modules": ["q_proj"], "json": "x.json"}
TRAIN = {"base_model": "m", "task": "sample", "data": "d", "output_dir": "o", "learning_rate": 1e-4, "seed": 1}
TRAIN |= {"num_experts": "2468", "filters": {"a": 1}, "bf16": False, "max_steps": 3, "logging_steps": 0.5}
ALLOCATE = {"method": "triangle", "budget": 20, "beta": 1.0, "adapter": "a"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "file.yaml"


@fuzz
@given(files(TASK, YAML_TEXTS) | files(WORDS_TASK, YAML_TEXTS), changed(ROW))
def test_task(path, content, row):
    path.write_bytes(content)
    task = survives(load_task, path)
    if isinstance(task, Task) and isinstance(row, dict):
        survives(task.example, row, 0)


@fuzz
@given(st.text(max_size=40) | st.sampled_from(["\0.yaml", "a" * 5000 + ".yaml", "/", "x.yaml/y.yaml", "\ud800.yaml"]))
def test_name_of_a_task(name):
    assert isinstance(survives(load_task, name), MolaError) or name in task_names()


@fuzz
@given(files(PLAN, YAML_TEXTS))
def test_recipe(path, content):
    path.write_bytes(content)
    survives(read_recipe, str(path))
    survives(parse, PlanOptions, ["--config", str(path)], prog="mola plan")


@fuzz
@given(files(TRAIN, YAML_TEXTS))
def test_recipe_of_a_training(path, content):
    path.write_bytes(content)
    survives(parse, TrainOptions, ["--config", str(path)], prog="mola train")


@fuzz
@given(changed(ALLOCATE))
def test_options_in_a_mapping(found):
    if isinstance(found, dict):
        survives(convert, AllocateOptions, found, "allocate")


@fuzz
@given(st.dictionaries(st.sampled_from(sorted(PLAN)), values(YAML_TEXTS)))
def test_values_of_options(found):
    survives(convert, PlanOptions, found, "recipe")

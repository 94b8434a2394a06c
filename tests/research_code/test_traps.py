"""The table of traps in the documentation is complete, its tests exist, and some of its rows are shown here."""

import ast
import dataclasses
import functools
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from research_code.training_options import ResearchTrainOptions

from mola import TrainOptions
from mola.data.encode import encode_examples
from mola.data.tasks import load_task
from mola.data.templates import get_template
from mola.data.tokenized import IGNORED
from mola.models.prompts import template_for, trained_template
from mola.training.model import adapter_config
from research_code.training import train_settings

from .scripts import write_dataset

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "research" / "research-code.md"
_ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", re.M)
_TEST = r"`([\w/]+\.py)::(\w+)`"
_TESTS = re.compile(rf"{_TEST}(, {_TEST})*")
_NOT_TESTED = re.compile(r"not tested: \S.+")


def rows():
    return [match.groups() for match in _ROW.finditer(PAGE.read_text(encoding="utf-8"))]


def named_tests():
    return sorted({test for *_, shown in rows() for test in re.findall(_TEST, shown)})


def test_every_trap_has_a_row():
    assert [int(number) for number, *_ in rows()] == list(range(1, 75))


def test_every_row_names_tests_or_says_why_there_is_none():
    wrong = [number for number, *_, shown in rows() if not (_TESTS.fullmatch(shown) or _NOT_TESTED.fullmatch(shown))]
    assert wrong == []


@functools.cache
def functions_in(path):
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_tests_of_the_traps_exist():
    assert [(path, name) for path, name in named_tests() if name not in functions_in(path)] == []


@pytest.fixture(scope="module")
def saved_rows(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("rows") / "data.hf", {"train": 12})


@pytest.mark.parametrize(
    ("flag", "value", "field", "expected"),
    [
        ("number_experts", "3", "num_experts", "3"),
        ("number_experts", "2,3,2,4", "num_experts", "2,3,2,4"),
        ("lora_r", "12", "r", "12"),
        ("lora_r", "[4,4,8,8]", "r", "4,4,8,8"),
        ("top_k", "1", "top_k", "1"),
        ("lora_target_modules", "q_proj", "target_modules", {"q_proj"}),
        ("lora_alpha", 2.5, "lora_alpha", 2.5),
    ],
)
def test_each_list_may_be_given_alone(flag, value, field, expected, saved_rows):
    data = str(saved_rows)
    plain, changed = (
        adapter_config(
            TrainOptions(**train_settings(ResearchTrainOptions(data_path=data, **flags), reports=False), use_cpu=True)
        )
        for flags in ({}, {flag: value})
    )
    assert getattr(changed, field) == expected
    names = [each.name for each in dataclasses.fields(plain)]
    differing = {name for name in names if getattr(plain, name) != getattr(changed, name)}
    assert differing == {field}


@pytest.mark.parametrize("trained", [None, "alpaca_short"])
def test_prompt_of_the_notebook_is_the_one_that_training_encodes(tiny_tokenizer, tmp_path, trained):
    """The task's template, or that of the adapter's training."""
    cells = json.loads((ROOT / "notebooks" / "mola_inference.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (source,) = [source for source in sources if source.startswith("row = ")]
    names = {"load_task": load_task, "template_for": template_for, "trained_template": trained_template}
    names |= {"task_name": "scienceqa", "tokenizer": tiny_tokenizer, "mola_weights": None}
    if trained is not None:
        names["mola_weights"] = str(tmp_path)
        (tmp_path / "run.json").write_text(json.dumps({"template": trained}), encoding="utf-8")
    exec(source, names)
    template = get_template(trained or names["task"].template)
    encoded, _ = encode_examples([names["example"]], tiny_tokenizer, template, cutoff_len=1024)
    (sample,) = encoded
    masked = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == IGNORED]
    assert tiny_tokenizer.decode(masked, skip_special_tokens=True) == names["prompt"]


def test_licence_is_part_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert all((ROOT / name).read_text(encoding="utf-8").strip() for name in project["license-files"])


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for group in project["optional-dependencies"].values() for requirement in group]
    return project["dependencies"], extras


def project_name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_requirements_are_ranges():
    needed, extras = requirements()
    assert [requirement for requirement in [*needed, *extras] if "==" in requirement.partition(";")[0]] == []
    assert [requirement for requirement in needed if ">=" not in requirement] == []


def test_every_import_is_a_requirement_and_no_library_is_shipped():
    needed, extras = requirements()
    known = {project_name(requirement) for requirement in [*needed, *extras]}
    for requirement in needed:  # what a library always brings along is there too
        brought = importlib.metadata.requires(project_name(requirement)) or []
        known |= {project_name(other) for other in brought if "extra ==" not in other}
    imported = set()
    for path in (ROOT / "src" / "mola").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    hosts = {"axolotl", "llamafactory", "swift"}  # of plug-ins, which only these import
    others = imported - set(sys.stdlib_module_names) - {"mola"} - hosts
    names = importlib.metadata.packages_distributions()
    assert {"torch", "peft", "transformers"} <= others
    missing = [name for name in others if not known & {project_name(found) for found in names.get(name, [name])}]
    assert missing == []
    assert [path.name for path in (ROOT / "src").iterdir() if (path / "__init__.py").is_file()] == ["mola"]

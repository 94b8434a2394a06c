"""The table of traps in the documentation is complete, and its tests exist."""

import ast
import re
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "from-the-research-code.md"
_ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \| `(.+)` \|$", re.M)


def rows():
    return [match.groups() for match in _ROW.finditer(PAGE.read_text(encoding="utf-8"))]


def test_every_trap_has_a_row():
    assert [int(number) for number, *_ in rows()] == list(range(1, 75))


@pytest.mark.parametrize(("number", "test"), [(number, test) for number, _, _, test in rows()])
def test_the_test_of_a_trap_exists(number, test):
    path, name = test.split("::")
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_licence_is_part_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert all((ROOT / name).read_text(encoding="utf-8").strip() for name in project["license-files"])


def test_requirements_are_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for group in project["optional-dependencies"].values() for requirement in group]
    pinned = [requirement for requirement in [*project["dependencies"], *extras] if "==" in requirement]
    assert pinned == []

"""The structure of the package: imports run in one direction, and its root stays small. See docs/research/design.md."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mola
from mola.cli import COMMANDS

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
PACKAGE = Path(mola.__file__).parent


def test_imports_keep_to_the_contracts():
    pytest.importorskip("importlinter", reason="needs the extra `dev`")
    # A process of its own: the linter silences loggers. It looks for the package where it is started.
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", PYPROJECT]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contract_about_commands_names_all_of_them():
    contracts = tomllib.loads(PYPROJECT.read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (protected,) = (contract["protected_modules"] for contract in contracts if contract["type"] == "protected")
    assert sorted(protected) == sorted({command.module for command in COMMANDS.values()})


def test_root_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_the_root_holds_only_public_names_and_modules():
    names = {name for name in vars(mola) if not name.startswith("_")} - set(mola.__all__)
    assert [name for name in names if not inspect.ismodule(getattr(mola, name))] == ["TYPE_CHECKING"]


def test_no_public_name_hides_a_module():
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(mola.__all__)

"""The `mola` command as a program of its own, which imports less than `import mola` does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mola._process import is_mola_command

from .grids import slow
from .versions import needs

MOLA = Path(sys.executable).with_name("mola")
ROOT = Path(__file__).parents[1]


def run(*words, flags=(), code=0, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *flags, *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == code, process.stderr
    return process


@needs("datasets", "4.7", "it imports torch for itself while data is prepared")
def test_preparing_needs_no_torch(tmp_path):
    words = ["prepare", "sample", "--output", tmp_path / "out", "--train_size", 8]
    imported = run(MOLA, *words, flags=["-X", "importtime"]).stderr
    names = set(re.findall(r"\| +([\w.]+)$", imported, re.M))
    assert {"mola.data.sampling", "datasets"} <= names
    assert not {"torch", "peft", "mola.tuner", "mola.training.train"} & names
    assert (tmp_path / "out" / "dataset.hf").is_dir()


def test_exit_code_is_2_for_wrong_input(tmp_path):
    process = run(MOLA, "prepare", "nosuch", "--output", tmp_path / "out", code=2)
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("mola prepare: error: `task`")


@pytest.mark.parametrize(
    ("program", "own"),
    [
        ("/usr/bin/mola", True),
        ("mola.exe", True),
        (ROOT / "scripts" / "preparation_instruction_data.py", True),
        (ROOT / "scripts" / "mola_training.py", True),
        (ROOT / "scripts" / "make_option_tables.py", False),
        ("nosuch/mola_training.py", False),
        ("pytest", False),
        ("my_mola.py", False),
        ("", False),
    ],
)
def test_commands_of_mola_are_recognised(program, own, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert is_mola_command() is own


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["-u", "-m", "mola.cli", "train"], True),
        (["-X", "dev", "-m", "mola"], True),
        (["-m", "other.package"], False),
    ],
)
def test_a_module_that_is_run_is_recognised(words, own, monkeypatch):
    """Launchers of several processes start each of them like this."""
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *words])
    assert is_mola_command() is own


CHECK = """
import os, sys
import mola
light = "torch" not in sys.modules
print(light, os.environ.get("OMP_WAIT_POLICY"), mola.TrainOptions.__name__, mola.train.__name__, mola.plan.__name__)
missing = [name for name in mola.__all__ if not hasattr(mola, name)]
assert not missing, missing
try:
    mola.nosuch
except AttributeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        pytest.param("other.py", None, "False None", marks=pytest.mark.slow),
        # Somebody's program that happens to be called like ours gets all names, when it asks for one.
        pytest.param("mola", None, "True PASSIVE", marks=pytest.mark.slow),
        pytest.param("mola", "ACTIVE", "True ACTIVE", marks=pytest.mark.slow),
    ],
)
def test_other_programs_find_every_name(tmp_path, monkeypatch, name, chosen, expected):
    (tmp_path / name).write_text(CHECK)
    variables = {"OMP_WAIT_POLICY": chosen} if chosen else {}
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    printed = run(tmp_path / name, **variables).stdout
    assert printed.splitlines() == [f"{expected} TrainOptions train plan", "module 'mola' has no attribute 'nosuch'"]


@pytest.mark.parametrize("words", [["--help"], *slow([], ["--json"])], ids=str)
def test_a_pipe_whose_reader_has_ended(words, tiny_model_dir):
    """A short text is written at the end of the program, which is when Python notices it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, MOLA, "plan", *words, "--base_model", tiny_model_dir]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, "")

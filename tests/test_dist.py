"""The built distributions: what is in them, and a user who has only the wheel. As `make dist`, with a package index."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from mola.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mola"

pytestmark = pytest.mark.slow


def run(*words, cwd, code=0) -> subprocess.CompletedProcess[str]:
    """A command that must end with `code`; nothing of this process's Python path is passed on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, cwd=cwd)
    assert process.returncode == code, process.stdout + process.stderr
    return process


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The sdist, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` of a new environment that holds the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    yield folder / "bin"
    shutil.rmtree(folder)  # with PyTorch in it: pytest would keep three


# ---------------------------------------------------------------------- content


def test_wheel_is_the_package_byte_by_byte(wheel):
    """It comes from the sdist, so nothing the package needs is missing there either."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    source = {
        path.relative_to(PACKAGE.parent).as_posix(): path.read_bytes()
        for path in (*PACKAGE.rglob("*"), PACKAGE.with_name("mola_vllm.py"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed.keys() == source.keys()
    assert packed == source
    assert {"mola/py.typed", "mola/reporting/templates/page.css", "mola/data/tasks/scienceqa.yaml"} <= packed.keys()


def test_sdist_is_what_the_wheel_is_built_from(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    top = {name.partition("/")[0] for name in names} - {""}
    assert top == {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "src"}
    assert not [name for name in names if "__pycache__" in name]


def test_metadata_is_accepted_by_an_index(dist):
    files = sorted(dist.iterdir())
    assert len(files) == 2
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=dist)


# ---------------------------------------------------------------------- use


def test_requirements_agree(installed, tmp_path):
    assert "No broken requirements" in run(installed / "python", "-m", "pip", "check", cwd=tmp_path).stdout


def test_import_registers_the_method(installed, tmp_path):
    program = "import mola, peft; print(mola.__file__, mola.__version__, peft.PeftType('MOLA').value)"
    place, version, name = run(installed / "python", "-W", "error", "-c", program, cwd=tmp_path).stdout.split()
    assert Path(place).is_relative_to(installed.parent)
    assert (version, name) == (importlib.metadata.version("mola-peft"), "MOLA")


def test_help_names_every_command(installed, tmp_path):
    printed = run(installed / "mola", "--help", cwd=tmp_path).stdout
    assert not [name for name in COMMANDS if not re.search(rf"^ +{name.split()[0]} ", printed, re.M)]


def test_from_data_to_report(installed, tiny_model_dir, tmp_path):
    def mola(*words):
        return run(installed / "mola", *words, cwd=tmp_path)

    base = ["--base_model", tiny_model_dir, "--dtype", "float32", "--task", "sample"]
    sizes = ["--train_size", 8, "--validation_size", 4, "--test_size", 4]
    mola("prepare", "sample", "--output", "data", *sizes)
    experts = ["--num_experts", "1,2,2,2", "--r", 2, "--max_steps", 2]
    mola("train", *base, "--data", "data/dataset.hf", "--output", "run", *experts)
    mola("evaluate", *base, "--adapter", "run", "--data", "data/test.json", "--output", "result.json")
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["total"] == 4
    mola("report", "run")
    assert "</html>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("serve", ["serve"]),
        ("demo", ["demo", "--adapter", "run"]),
        ("lm-eval", ["lm-eval", "--tasks", "arc_easy", "--output", "result.json"]),
        ("quant", ["evaluate", "--task", "sample", "--data", "d.json", "--output", "r.json", "--load_in_4bit", "true"]),
    ],
)
def test_missing_extra_is_named(installed, tiny_model_dir, tmp_path, extra, words):
    (tmp_path / "run").mkdir()  # what does not exist is named before what is not installed
    (tmp_path / "d.json").write_text("[]", encoding="utf-8")
    process = run(installed / "mola", *words, "--base_model", tiny_model_dir, cwd=tmp_path, code=2)
    (line,) = process.stderr.splitlines()
    assert f"pip install 'mola-peft[{extra}]'" in line


def test_missing_trl_is_named(installed, tmp_path):
    process = run(installed / "python", "-m", "mola.integrations.trl_command", "sft", cwd=tmp_path, code=1)
    assert process.stderr == "trl_command: error: TRL is not installed. Run: pip install 'mola-peft[trl]'\n"


# ---------------------------------------------------------------------- types

RIGHT = """
import mola
from mola import MolaConfig, MolaError, TrainOptions, TrainResult, train

config = MolaConfig(num_experts=[1, 2], r=8, task_type="CAUSAL_LM")


def tune(folder: str) -> TrainResult:
    if not folder:
        raise MolaError("`folder` is empty")
    return train(TrainOptions(base_model=folder, data="train.json", output_dir=mola.__version__))

"""
WRONG = """\
MolaConfig(num_experts=1.5)
TrainOptions(num_expert=2)
tune("base").nosuch
mola.nosuch
"""


def test_type_checker_of_a_user_finds_what_is_wrong_and_nothing_else(installed, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(RIGHT + WRONG, encoding="utf-8")
    python = f"--python-executable={installed / 'python'}"
    printed = run(sys.executable, "-m", "mypy", "--strict", python, path, cwd=tmp_path, code=1).stdout
    first = len(RIGHT.splitlines()) + 1
    wrong = [str(number) for number in range(first, first + len(WRONG.splitlines()))]
    assert re.findall(r"^program\.py:(\d+): error", printed, re.M) == wrong
    assert f"Found {len(wrong)} errors in 1 file" in printed

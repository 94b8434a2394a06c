"""Other trainers need other versions than mola is tested with: an environment for each, kept between runs."""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import filelock
import pytest

ROOT = Path(__file__).parents[2]
_CACHE = ROOT / ".cache" / "integrations"


def venv(name, requirements, stand_ins=(), *, python=sys.executable, overrides=()):
    """The Python of an environment with this mola and these requirements; skips where they cannot be installed.

    `stand_ins` are folders of packages in the place of such that a requirement asks for; `overrides` replace what a
    package asks for, as uv's option does.
    """
    folder = _CACHE / name
    interpreter, stamp, changes = folder / "bin" / "python", folder / "installed", folder.with_suffix(".overrides")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = (requirements, str(python), overrides, project["dependencies"], project["entry-points"])
    wanted = hashlib.sha256(repr(stated).encode()).hexdigest()
    _CACHE.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(_CACHE / f"{name}.lock"):
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return interpreter
        shutil.rmtree(folder, ignore_errors=True)
        changes.write_text("\n".join(overrides), encoding="utf-8")
        links = [word for link in os.environ.get("PIP_FIND_LINKS", "").split() for word in ("--find-links", link)]
        if "PIP_INDEX_URL" in os.environ:  # uv reads no settings of pip
            links += ["--default-index", os.environ["PIP_INDEX_URL"]]
        install = ["-m", "uv", "pip", "install", "--quiet", "--python", interpreter, "--overrides", changes, *links]
        for command in (
            [python, "-m", "venv", folder],
            [interpreter, "-m", "pip", "install", "--quiet", "uv"],
            [interpreter, *install, *requirements, *stand_ins, "--editable", ROOT],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "No solution found" in done.stderr:
                pytest.fail(f"{name} and mola exclude each other: {done.stderr.strip()[-500:]}")
            if done.returncode:
                pytest.skip(f"{name} cannot be installed: {done.stderr.strip()[-500:]}")
        stamp.write_text(wanted, encoding="utf-8")
    return interpreter


def run_in(program, arguments, cwd=None, **variables):
    """A finished process of an environment: on the CPU, without a hub, telling nobody."""
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    path = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
    environment = {**os.environ, **quiet, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
    environment.pop("PYTHONPATH", None)  # of the environment that runs the tests
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


def run(program, *arguments, cwd, succeeds=True):
    """What a program of an environment printed."""
    done = run_in(program, arguments, cwd)
    printed = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, printed[-5000:]
    return printed

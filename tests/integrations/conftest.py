"""Other trainers in virtual environments of their own, which stay in the repository's `.cache/integrations`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import filelock
import pytest

ROOT = Path(__file__).parents[2]
_CACHE = ROOT / ".cache" / "integrations"


@pytest.fixture(scope="session")
def venv():
    """`venv(name, requirements)`: the Python of an environment with these and this repository, made once.

    `stand_ins` are folders of packages in the place of such that these ask for. Skips where they cannot be installed.
    """

    def make(name: str, requirements: list[str], stand_ins: Sequence[Path] = ()) -> Path:
        folder, wanted = _CACHE / name, "\n".join(requirements)
        python, stamp = folder / "bin" / "python", folder / "requirements.txt"
        _CACHE.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(_CACHE / f"{name}.lock"):
            if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
                shutil.rmtree(folder, ignore_errors=True)
                subprocess.run([sys.executable, "-m", "venv", folder], check=True)
                install = [python, "-m", "pip", "install", "-q", *requirements, *stand_ins, "-e", ROOT]
                done = subprocess.run(install, capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"{name} cannot be installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
                stamp.write_text(wanted, encoding="utf-8")
        return python

    return make


@pytest.fixture(scope="session")
def run_in():
    """`run_in(python, arguments, **environment)`: a finished process of such an environment, without a hub."""

    def run(python: Path, arguments: list, **environment: str) -> subprocess.CompletedProcess:
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        settings = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        command = [python, *map(str, arguments)]
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600)

    return run

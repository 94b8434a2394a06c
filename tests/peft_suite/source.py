"""PEFT's own tests: part of its source distribution, fetched when needed and never kept in this repository."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

from mola.errors import MolaError

PACKAGE = "peft_tests"


def installed_version() -> str:
    """Version of the installed PEFT; its tests must be those of the same version."""
    return importlib.metadata.version("peft")


def fetch_tests(cache: Path) -> Path:
    """Put PEFT's tests into `cache`, as the package `peft_tests`.

    Args:
        cache: folder that may be kept from run to run.

    Returns:
        The folder that holds `peft_tests`.

    Raises:
        MolaError: there is no source distribution of the installed version, or it holds no tests.
    """
    version = installed_version()
    target = cache / version
    if not (target / PACKAGE / "__init__.py").is_file():
        _extract(_download(cache / "sdist", version), target / PACKAGE, version)
    return target


def _download(folder: Path, version: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), f"peft=={version}"], capture_output=True, text=True)
    archive = folder / f"peft-{version}.tar.gz"
    if done.returncode != 0 or not archive.is_file():
        raise MolaError(
            f"The source distribution of peft {version}, the installed version, cannot be downloaded: "
            f"{done.stderr.strip() or 'pip gave another file'}. Install a released version of PEFT."
        )
    return archive


def _extract(archive: Path, package: Path, version: str) -> None:
    with tarfile.open(archive) as source:
        root = f"peft-{version}"
        information = source.extractfile(f"{root}/PKG-INFO")
        found = information.read().decode() if information else ""
        if f"\nVersion: {version}\n" not in found:
            raise MolaError(f"{archive.name} must hold peft {version}, the installed version; its PKG-INFO does not.")
        members = [m for m in source.getmembers() if m.isfile() and Path(m.name).parent.as_posix() == f"{root}/tests"]
        if not members:
            raise MolaError(f"{archive.name} has no tests; choose a version of PEFT whose source distribution does.")
        package.mkdir(parents=True, exist_ok=True)
        for member in members:
            content = source.extractfile(member)
            assert content is not None
            (package / Path(member.name).name).write_bytes(content.read())
    # Last, as the sign that everything is there: the tests import each other as one package.
    (package / "__init__.py").touch()

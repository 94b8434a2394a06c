"""What a newcomer to the repository meets: the documentation as a site, workflows, templates."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="needs MkDocs Material: pip install 'mola-peft[docs]'"
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    built = {path.parent.relative_to(tmp_path / "site") for path in (tmp_path / "site").glob("*/*/index.html")}
    assert pages - {Path("index")} == built
    assert "https://fonts" not in (tmp_path / "site" / "index.html").read_text()


def test_the_wheel_gets_all_files_of_the_package():
    """Setuptools packs only Python files and those that `package-data` names; `test_dist.py` builds the wheel."""
    package = ROOT / "src" / "mola"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mola"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".py"}
    others = {path for path in others if "__pycache__" not in path.parts}
    assert others - packed == set()
    assert package / "studies" / "quickstart.yaml" in packed


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *arguments: None)
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    text = str(navigation)
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"'{page.relative_to(ROOT / 'docs')}'" in text, page.name


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_templates_are_readable_and_call_targets_that_exist(path):
    content = yaml.safe_load(path.read_text())
    assert content
    for job in content.get("jobs", {}).values():
        matrix = job.get("strategy", {}).get("matrix", {})
        named = [*matrix.get("target", []), *(row["target"] for row in matrix.get("include", []))]
        for step in job["steps"]:
            target = re.search(r"make (\S+)", step.get("run", ""))
            if target is not None:
                called = named if "matrix.target" in step["run"] else [target[1]]
                assert called
                assert set(called) <= TARGETS

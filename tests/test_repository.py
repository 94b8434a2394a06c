"""What a newcomer to the repository meets: the documentation as a site, workflows, templates."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def build_site(folder, **environment):
    """Build the site as the workflow does; a warning is an error."""
    if not all(map(importlib.util.find_spec, ("material", "mkdocstrings"))):
        pytest.skip("needs MkDocs Material and mkdocstrings: pip install 'mola-peft[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path):
    site = build_site(tmp_path / "site")
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    built = {path.parent.relative_to(site) for path in site.glob("*/*/index.html")}
    assert pages - {Path("index")} == built
    assert "https://fonts" not in (site / "index.html").read_text()
    api = (site / "reference" / "python-api" / "index.html").read_text()
    assert "rank of each expert: one integer" in api


def test_links_out_of_the_docs_lead_to_the_repository(tmp_path):
    urls = {"SITE_URL": "https://site.example/mola/", "REPO_URL": "https://host.example/mola", "EDIT_URI": "edit/main/"}
    training = (build_site(tmp_path, **urls) / "guides" / "training" / "index.html").read_text()
    assert 'href="https://host.example/mola/blob/main/recipes/qwen3.yaml"' in training
    assert 'href="https://host.example/mola/edit/main/guides/training.md"' in training
    assert 'href="https://site.example/mola/guides/training/"' in training
    index = (tmp_path / "index.html").read_text()
    assert 'href="https://host.example/mola/tree/main/recipes"' in index


def test_a_link_to_a_missing_file_is_a_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    links = importlib.import_module("repository_links")
    (tmp_path / "docs").mkdir()
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md", abs_src_path=str(tmp_path / "docs" / "page.md")))
    config = SimpleNamespace(docs_dir=str(tmp_path / "docs"), repo_url="")
    assert links.on_page_markdown("See [it](../gone.yaml#part).", page, config) == "See it."
    assert [record.message for record in caplog.records] == ["page.md: no such file: ../gone.yaml"]


def test_the_wheel_gets_all_files_of_the_package():
    """Setuptools packs only Python files and those that `package-data` names; `test_dist.py` builds the wheel."""
    package = ROOT / "src" / "mola"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mola"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".py"}
    others = {path for path in others if "__pycache__" not in path.parts}
    assert others - packed == set()
    assert package / "studies" / "quickstart.yaml" in packed


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

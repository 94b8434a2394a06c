"""The documentation is true: its commands exist, its links lead somewhere, nothing public is left out.

`tests/test_docs_run.py` runs its code.
"""

import functools
import importlib
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mola
from mola import cli
from mola.options.parsing import parse
from tests.docs_blocks import PAGES, ROOT, blocks, commands, page_id, write_files

_LINK = re.compile(r"\]\((?!https?:|mailto:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


def bash_blocks(page):
    return [block for block in blocks(page) if block.kind == "bash"]


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page_id(page)) for page in PAGES if any(map(commands, bash_blocks(page)))]
)
def test_commands_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    for name, *arguments in [found for block in bash_blocks(page) for found in commands(block)]:
        if name == "with":  # another program follows
            continue
        name, arguments = cli.split_command([name, *arguments])
        command = cli.COMMANDS[name]
        assert callable(cli.find(f"{command.module}.{command.function}"))
        options = cli.find(command.options)
        words = without_missing_recipe(arguments)
        if name == "train" and words != arguments and "--output" not in words:
            words = [*words, "--output", "out"]  # which the recipe has
        names_adapter = "--adapter" in words or (command.positional == "adapter" and words[0][:1] != "-")
        names_adapter |= name in ("skills add", "skills test")
        if names_adapter and name != "reallocate" and "--base_model" not in words:
            words = [*words, "--base_model", "my-model"]  # which the adapter records
        parsed = parse(options, words, prog=name, positional=command.positional, further=command.further)
        assert isinstance(parsed, options)


def without_missing_recipe(arguments):
    """A recipe of the repository is read there; one that nobody shows is left out, the flags beside it are checked."""
    if "--config" not in arguments:
        return arguments
    place = arguments.index("--config")
    recipe = next((path for path in (Path(arguments[place + 1]), ROOT / arguments[place + 1]) if path.exists()), None)
    return [*arguments[:place], *(["--config", str(recipe)] if recipe else []), *arguments[place + 2 :]]


@pytest.mark.parametrize("page", [pytest.param(page, id=page_id(page)) for page in PAGES])
def test_links_lead_somewhere(page):
    for match in _LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / match["path"] if match["path"] else page
        assert target.exists(), f"{page_id(page)}: {match[0]}"
        if match["anchor"]:
            assert match["anchor"] in anchors(target), f"{page_id(page)}: {match[0]}"


@functools.cache
def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ +(.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_public_name_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    missing = [
        name for name in mola.__all__ if not re.search(rf"`(mola\.)?{re.escape(name)}[`(]|\bmola\.{name}\b", text)
    ]
    assert not missing


def test_every_field_of_the_configuration_is_documented():
    arguments = re.findall(r"^ +(\w+) \(.+?\): ", inspect.getdoc(mola.MolaConfig), re.M)
    assert sorted(arguments) == sorted(mola.MolaConfig.__annotations__)


def test_the_docstring_of_every_public_name_is_on_the_site():
    text = (ROOT / "docs" / "reference" / "python-api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: mola\.(\w+)$", text, re.M)
    assert sorted(shown) == sorted(set(mola.__all__) - {"__version__"})


def test_option_tables_are_up_to_date():
    path = ROOT / "scripts" / "make_option_tables.py"
    spec = importlib.util.spec_from_file_location("make_option_tables", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.TARGET.read_text(encoding="utf-8") == script.render(), "run scripts/make_option_tables.py"


def linked(page):
    """Files and folders that a page links to; none of what is no page."""
    if page.suffix != ".md":
        return set()
    paths = (match["path"] for match in _LINK.finditer(page.read_text(encoding="utf-8")))
    return {(page.parent / path).resolve() for path in paths if path}


@pytest.fixture(scope="module")
def near():
    """What a newcomer finds from the README in two clicks."""
    first = linked(ROOT / "README.md")
    return first.union(*(linked(page) for page in first))


def test_everything_is_two_clicks_from_the_readme(near):
    folders = {path.parent for path in (ROOT / "recipes").rglob("*.yaml")}
    wanted = {*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "notebooks").glob("*.ipynb"), *folders} - {ROOT / "README.md"}
    assert sorted(page_id(path) for path in wanted - near) == []


def test_every_command_is_shown_on_a_page_two_clicks_from_the_readme(near):
    pages = [page for page in near & set(PAGES) if page.name not in ("README.md", "index.md", "options.md")]
    shown = {
        cli.split_command(words)[0]
        for page in pages
        for block in blocks(page)
        if block.kind == "bash"
        for words in commands(block)
    }
    assert sorted(cli.COMMANDS.keys() - shown - {"quickstart"}) == []  # the one that `make` runs
    tables = (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## mola (.+)$", tables, re.M)
    assert sorted(sections) == sorted(cli.COMMANDS)


def test_every_command_is_in_the_table_that_the_readme_links():
    text = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert ROOT / "docs" / "reference" / "commands.md" in linked(ROOT / "README.md")
    assert [
        name
        for name in {each.split()[0] for each in cli.COMMANDS}
        if f"mola {name}" not in text and f"make {name}" not in text
    ] == []


@pytest.mark.parametrize("page", ["README.md", "docs/get-started/install.md"])
def test_the_lowest_versions_and_all_extras_are_named(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    lowest = {name: [each.version for each in found if each.operator == ">="] for name, found in required.items()}
    python = project["requires-python"].removeprefix(">=")
    torch, transformers, peft = (lowest[name][0] for name in ("torch", "transformers", "peft"))
    assert f"Python {python}, PyTorch {torch}, Transformers {transformers}, PEFT {peft} or newer" in text
    if page != "README.md":
        extras = set(project["optional-dependencies"]) - {"test", "dev", "docs"}
        named = re.findall(r"`([\w-]+)`", " ".join(re.findall(r"\| (`[^|]+`) \| ", text)))
        assert sorted(named) == sorted(extras)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).splitlines()
    assert len(text.splitlines()) <= 135
    assert [line for line in prose if len(line) > 120 and not line.startswith("|")] == []


def test_every_dependency_is_in_the_table_of_licences():
    text = (ROOT / "docs" / "reference" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| \S+ \| (.+) \| (.+) \|$", text, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    users = {
        name: each for name, each in project["optional-dependencies"].items() if name not in ("dev", "docs", "test")
    }
    listed = {name: each for name, each in users.items() if f"`{name}`" not in text.partition("all extras but")[2]}
    assert users.keys() - listed.keys() == {"vllm"}  # it brings a PyTorch of its own
    wanted = {
        Requirement(each).name
        for each in [*project["dependencies"], *(line for each in listed.values() for line in each)]
    }
    assert wanted <= {name for name, _, _ in rows}

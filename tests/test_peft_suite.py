"""The lists and the judge of `make test-peft`; PEFT's tests themselves are run by that command only."""

import sys

import pytest

from mola import MolaError
from tests.peft_suite.__main__ import PAGE
from tests.peft_suite.lists import Lists, NotApplicable, WrittenForLora
from tests.peft_suite.plugin import Suite
from tests.peft_suite.report import BEGIN, END, Result, markdown, write_page

LISTS = Lists.load()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("not_applicable.yaml", "[{tests: a, kind: b, error: c, reason: d}]", "`kind` must be one of .* got 'b'"),
        ("not_applicable.yaml", "[{tests: a, kind: hub, error: c}]", "Entry 1 .* not valid.*reason"),
        ("written_for_lora.yaml", "[{tests: a, config: LoraConfig}]", "`config` must be one of .* got 'LoraConfig'"),
    ],
)
def test_a_wrong_entry_is_refused(tmp_path, monkeypatch, name, text, message):
    for file in ("not_applicable.yaml", "written_for_lora.yaml"):
        (tmp_path / file).write_text("[]")
    (tmp_path / name).write_text(text)
    monkeypatch.setattr("tests.peft_suite.lists._FOLDER", tmp_path)
    with pytest.raises(MolaError, match=message):
        Lists.load()


# ---------------------------------------------------------------------- the judge

TESTS = """
import pytest

class LoraConfig:
    num_experts = None

methods = pytest.mark.parametrize("config_cls", [LoraConfig])

class TestMethods:
    @methods
    def test_ours(self, config_cls):
        assert config_cls().num_experts in (1, 4)

    @methods
    def test_listed(self, config_cls):
        assert config_cls().num_experts == 1, "several experts"

    @methods
    def test_skips(self, config_cls):
        pytest.skip("not for this one")

    @methods
    def test_unlisted(self, config_cls):
        assert not UNLISTED

def test_of_lora():
    assert LoraConfig().num_experts == 4

def test_of_another_method():
    assert LoraConfig().num_experts == 4
"""


def judge(folder, monkeypatch, *entries, unlisted=False):
    """Exit code and result of a run of `TESTS`."""
    package = folder / "peft_tests"
    package.mkdir()
    (package / "test_demo.py").write_text(TESTS.replace("UNLISTED", str(unlisted)))
    lists = Lists(tuple(entries), (WrittenForLora(r"test_demo\.py::test_of_lora", "Mixture"),))
    monkeypatch.chdir(folder)
    for name in ("peft_tests", "peft_tests.test_demo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    arguments = ["-c", "/dev/null", "--rootdir", str(folder), "-p", "no:cacheprovider", "-q", "--import-mode=importlib"]
    code = pytest.main([*arguments, str(package)], plugins=[Suite(lists, folder / "result.json")])
    return code, Result.read(folder / "result.json"), lists


def entry(tests=r"test_demo\.py::TestMethods::test_listed\[Mixture\]", error="several experts"):
    return NotApplicable(tests, "mixture", error, "A mixture is several experts, and that is that.")


def test_our_cases_take_the_place_of_others(tmp_path, monkeypatch):
    code, result, lists = judge(tmp_path, monkeypatch, entry())
    assert code == 0
    assert result.outcomes == {"test_demo.py": {"passed": 6, "listed": 1, "skipped": 2, "left_out": 1}}
    assert result.skipped == {"not for this one": 2}
    assert result.stale(lists) == []


def test_an_unlisted_failure_fails(tmp_path, monkeypatch):
    code, result, _ = judge(tmp_path, monkeypatch, entry(), unlisted=True)
    assert code == 1
    assert result.total("failed") == 2


def test_a_listed_test_that_passes_fails(tmp_path, monkeypatch):
    code, result, _ = judge(tmp_path, monkeypatch, entry(tests=r"test_demo\.py::TestMethods::test_listed.*"))
    assert code == 1
    assert (result.total("failed"), result.total("listed")) == (1, 1)


def test_an_entry_that_nothing_matches_is_stale(tmp_path, monkeypatch):
    gone = entry(tests=r"test_demo\.py::TestMethods::test_gone")
    code, result, lists = judge(tmp_path, monkeypatch, entry(), gone)
    assert code == 0
    assert result.stale(lists) == [gone.tests]


# ---------------------------------------------------------------------- the page


def test_the_page_gives_the_reason_of_every_entry():
    page = PAGE.read_text(encoding="utf-8")
    assert [entry.reason for entry in LISTS.not_applicable if f"- {entry.reason} (" not in page] == []


def test_the_result_goes_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}earlier result\n{END}after\n")
    result = Result({"test_demo.py": {"passed": 2, "listed": 1}}, {"a": 1}, {"Not\n for <class 'x'>.": 1})
    write_page(page, markdown(result, Lists((NotApplicable("a", "hub", "e", "Downloads."),), ())))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| `test_demo.py` | 2 | 1 | 0 | 0 |" in text
    assert "- Downloads. (1 test)" in text
    assert "earlier result" not in text
    page.write_text("no marks")
    with pytest.raises(MolaError, match="must hold the lines"):
        write_page(page, "text")

"""The check of plain English finds what it is there for, and lets plain English pass."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
specification = importlib.util.spec_from_file_location("check_prose", ROOT / "scripts" / "check_prose.py")
check_prose = importlib.util.module_from_spec(specification)
specification.loader.exec_module(check_prose)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("word " * 31 + "end.", "32 words, at most 30"),
        ("A thing: one part; and another part.", "more than one colon or semicolon"),
        ("Of all layers are the lowest left out.", "begins with its object"),
        ("Compared are other values.", "begins with its verb"),
        ("The two were not told apart.", "not a word of the field"),
        ("mola refuses it.", "`refuse`"),
    ],
)
def test_what_is_hard_to_read_is_found(tmp_path, text, rule):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\nA first line.\n\n{text}\n", encoding="utf-8")
    (found,) = check_prose.check_page(page)
    assert found.startswith("page.md:5: ")
    assert rule in found


def test_code_links_and_short_sentences_pass(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("See [a page](x.md): it runs `a; b: c; d`.\n\n    refused: code; of all: kinds\n", encoding="utf-8")
    assert list(check_prose.check_page(page)) == []


def test_messages_of_errors_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(check_prose, "ROOT", tmp_path)
    file = tmp_path / "code.py"
    file.write_text("raise MolaError(f'{name} was refused.')\n", encoding="utf-8")
    (found,) = check_prose.check_messages(file)
    assert found.startswith("code.py:1: `refuse`")
    assert "Code was refused" in found


def test_the_mean_length_counts_sentences_and_no_titles_or_cells(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\nOne two. One two three four.\n\n| a | b |\n| - | - |\n| one | two. |\n", encoding="utf-8"
    )
    assert check_prose.main([str(page)]) == 0
    assert capsys.readouterr().out == "2 sentences on 1 pages, 3.0 words on average\n"

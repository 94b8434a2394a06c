"""Check that pages, help texts and messages are plain English: `python scripts/check_prose.py [PAGE ...]`.

A sentence must be short, have at most one colon or semicolon, begin with its subject, and use the field's words. What
breaks a rule is printed as `file:line: rule: sentence`, and then the exit code is 1. The last line has the mean length.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
# Longest sentence, in words, of the pages in each place; the first that fits.
LIMITS = {"docs/research": 45, "docs/reference": 36, "CHANGELOG.md": 45, "": 30}
MESSAGE, TABLE_CELL = 36, 36
ONE_COLON = {"more than one colon or semicolon": r"[:;]\s.*[:;]\s"}
RULES = {
    "begins with its object": r"^(Of|From|With|In) (a|an|the|each|every|all|these|those)?\s?\w+ (is|are|was|were) ",
    "begins with its verb": r"^(So|Refused|Seen|Measured|Not|Left out|Always asked|Named|Compared) (is|are|was|were) ",
    "not a word of the field": r"\b(not told apart|hand(s|ed)? on|no such thing|anew|thereby|whereby|aforementioned)\b",
    "`refuse`: say what is not supported, or what raises": r"\b[Rr]efus(e|es|ed|al)\b",
}
_ABBREVIATIONS = r"(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<!vs\.)"
_END = re.compile(rf'(?<=[.!?]){_ABBREVIATIONS}["\')]*\s+(?=[A-Z"(0-9])')


def main(pages: list[str]) -> int:
    """Check the pages named, or all pages, help texts and messages; 1 if something was found."""
    every = [Path(page).resolve() for page in pages] or [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    finds = [find for page in every for find in check_page(page)]
    if not pages:
        finds += [find for file in sorted(ROOT.glob("src/**/*.py")) for find in check_messages(file)]
    prose = [text for page in every for text, _, in_cell in _texts(page) if not in_cell]
    lengths = [len(each.split()) for text in prose for each in _END.split(text) if each.endswith((".", "?", "!", ":"))]
    print(
        *finds,
        f"{len(lengths):,} sentences on {len(every)} pages, {fmean(lengths or [0]):.1f} words on average",
        sep="\n",
    )
    return int(bool(finds))


def check_page(page: Path) -> Iterator[str]:
    """What is wrong on a page of Markdown; code, links and comments are left out."""
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    limit = next(words for place, words in LIMITS.items() if name.startswith(place))
    for text, line, in_cell in _texts(page):
        if in_cell:
            yield from _check(text, f"{name}:{line}", TABLE_CELL, RULES)
        else:
            yield from _check(text, f"{name}:{line}", limit, RULES | ONE_COLON)


def _texts(page: Path) -> Iterator[tuple[str, int, bool]]:
    """Texts of a page, their lines, and whether they are in a table."""
    line, in_cell = 0, False
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else line
        in_cell = token.type == "td_open" or (in_cell and token.type != "td_close")
        if token.type == "inline" and not token.content.startswith(":::"):  # a docstring on the site
            yield "".join(_text(child.type, child.content) for child in token.children or []), line, in_cell


def check_messages(file: Path) -> Iterator[str]:
    """What is wrong with the messages of the errors that a file raises, and with its options' help texts."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("MolaError", "option", "required"):
            for part in node.args:
                if text := _literal(part):
                    yield from _check(text, f"{file.relative_to(ROOT)}:{node.lineno}", MESSAGE, RULES)


def _text(kind: str, content: str) -> str:
    return {"text": content, "code_inline": "Code", "softbreak": " ", "hardbreak": " "}.get(kind, "")


def _literal(node: ast.expr) -> str:
    """The text of a string or an f-string, with `Code` in place of values and of quoted names."""
    if isinstance(node, ast.JoinedStr):
        parts = [str(each.value) if isinstance(each, ast.Constant) else "Code" for each in node.values]
    else:
        parts = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
    return re.sub(r"`[^`]*`", "Code", "".join(parts))


def _check(text: str, place: str, limit: int, rules: dict[str, str]) -> Iterator[str]:
    for sentence in _END.split(text):
        if (words := len(sentence.split())) > limit:
            yield f"{place}: {words} words, at most {limit}: {sentence}"
        for rule, pattern in rules.items():
            if re.search(pattern, sentence):
                yield f"{place}: {rule}: {sentence}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

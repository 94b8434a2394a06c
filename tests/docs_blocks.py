"""The code blocks of the documentation, and what a comment in the line before a block says about it.

<!-- run -->          python: executed, blocks of one page share their names; bash: every line is executed
<!-- run: PACKAGE --> the same, skipped if the package is not installed
<!-- file: NAME -->   written to the working folder before anything of the page runs
"""

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>run|file)(?:: (?P<value>\S+))? -->\n)?^ *```(?P<kind>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)


class Block(NamedTuple):
    mark: str | None
    value: str | None
    kind: str
    text: str
    line: int


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["mark"], m["value"], m["kind"], textwrap.dedent(m["text"]), text[: m.start("text")].count("\n") + 1)
        for m in _BLOCK.finditer(text)
    ]


def lines(block):
    """Words of every line of a bash block."""
    return [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]


def commands(block):
    """Arguments of every `mola` command in a bash block, behind a launcher too."""
    found = []
    for line in lines(block):
        words = [word for word in line if word != "--"]
        if words[:1] == ["mola"]:
            found.append(words[1:])
        elif "-m" in words and words[words.index("-m") + 1] == "mola":
            found.append(words[words.index("-m") + 2 :])
    return found


def page_id(page):
    return str(page.relative_to(ROOT))


def write_files(page, folder):
    for block in blocks(page):
        if block.mark == "file":
            (folder / block.value).write_text(block.text, encoding="utf-8")

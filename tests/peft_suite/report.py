"""What came of a run: the verdict, a table for the terminal, the generated part of `docs/research/peft-suite.md`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mola.errors import MolaError
from mola.files.atomic import atomic_write_text
from mola.files.environment import machine_description, software_versions
from tests.peft_suite.lists import REASONS, Lists

BEGIN, END = "<!-- written by `make test-peft`: begin -->\n", "<!-- written by `make test-peft`: end -->\n"
_COLUMNS = ("passed", "listed", "skipped", "failed", "left_out")


@dataclass
class Result:
    """Counts of one run.

    Attributes:
        outcomes: test file -> outcome -> number of tests.
        listed: regular expression of an entry -> tests that failed as listed.
        skipped: reason -> tests that skipped themselves.
    """

    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    listed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Result:
        """The result that the plugin wrote.

        Raises:
            MolaError: pytest ended before it wrote one.
        """
        if not path.is_file():
            raise MolaError("pytest ended without a result; its messages above say why.")
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def total(self, outcome: str) -> int:
        """Number of tests with an outcome."""
        return sum(counts.get(outcome, 0) for counts in self.outcomes.values())

    def stale(self, lists: Lists) -> list[str]:
        """Entries under which a test must fail and none did; the regular expressions."""
        must_fail = [entry.tests for entry in lists.not_applicable if entry.kind != "rounding"]
        return [tests for tests in must_fail if tests not in self.listed]


def markdown(result: Result, lists: Lists) -> str:
    """Versions, a table per test file, and what does not apply with the number of tests."""
    versions = ", ".join(f"{name} {version}" for name, version in software_versions().items())
    rows = [*sorted(result.outcomes.items()), ("all", {column: result.total(column) for column in _COLUMNS})]
    lines = [
        f"Versions: {versions}. Machine: {machine_description()['cpu']}.",
        "",
        "| tests | passed | do not apply | skip themselves | written for other methods |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(_row(f"`{name}`" if name != "all" else name, counts) for name, counts in rows),
    ]
    for kind, title in REASONS.items():
        lines += ["", f"Do not apply: {title}.", ""]
        for entry in lists.not_applicable:
            if entry.kind == kind:
                lines.append(f"- {entry.reason} {_tests(result.listed.get(entry.tests, 0))}")
    lines += ["", "Skip themselves, in PEFT's words:", ""]
    lines += [f"- {_plain(reason)} {_tests(number)}" for reason, number in sorted(_merged(result.skipped).items())]
    return "\n".join(lines) + "\n"


def write_page(page: Path, text: str) -> None:
    """Put `text` between the two marks of a page.

    Raises:
        MolaError: the page has no such marks.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MolaError(f"{page} must hold the lines {BEGIN.strip()!r} and {END.strip()!r}; the result goes between.")
    atomic_write_text(page, f"{before}{begin}\n{text}\n{end}{after}")


def _row(name: str, counts: dict[str, int]) -> str:
    shown = [str(counts.get(column, 0)) for column in _COLUMNS if column != "failed"]
    return f"| {name} | {' | '.join(shown)} |"


def _tests(number: int) -> str:
    return f"({number} test{'' if number == 1 else 's'})"


def _merged(skipped: dict[str, int]) -> dict[str, int]:
    """Reasons that differ in the class of ours that stands in are one."""
    merged: dict[str, int] = {}
    for reason, number in skipped.items():
        plain = reason.replace("Mixture", "MolaConfig").replace("OneExpert", "MolaConfig")
        merged[plain] = merged.get(plain, 0) + number
    return merged


def _plain(reason: str) -> str:
    """The reason in one line, with a class named by its name."""
    name = reason.replace("<class 'tests.peft_suite.cases.", "").replace("'>", "")
    return " ".join(name.split()).rstrip(".") + "."

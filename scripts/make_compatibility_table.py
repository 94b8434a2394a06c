"""Writes the table in docs/reference/compatibility.md: runs the tests marked with `compatibility`, records results.

python scripts/make_compatibility_table.py                        every marked test, slow ones too: some minutes
python scripts/make_compatibility_table.py --columns DDP FSDP     these columns only; other cells stay as they are

A test names its cell: `@pytest.mark.compatibility(column="train", family="llama")`. Without `family`, the test's
parameter `family` is used. Several tests may share a cell: all of them have to pass.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "reference" / "compatibility.md"
COLUMNS = ("targets", "train", "save/load", "generate", "switching", "checkpointing", "compile")
COLUMNS += ("quantised", "DDP", "FSDP")
FAMILIES = {
    "llama": "LLaMA",
    "mistral": "Mistral",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, text",
    "gemma3-composite": "Gemma 3 with its vision tower",
    "phi": "Phi",
    "phi3": "Phi-3",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "falcon": "Falcon",
    "mixtral": "Mixtral",
    "qwen2-moe": "Qwen2-MoE",
    "qwen3-moe": "Qwen3-MoE",
    "t5": "T5",
    "bart": "BART",
    "sequence-classifier": "sequence classifier (LLaMA)",
    "token-classifier": "token classifier (BERT)",
}
UNTESTED, NOTHING_TO_TEST = "not tested here", "-"
_NOT_GENERATING = ("sequence-classifier", "token-classifier")
_TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of the table -->)", re.S)


class Cell(NamedTuple):
    """A place in the table."""

    family: str
    column: str


Cells = dict[Cell, str]


class Recorder:
    """A pytest plugin that records which cells the collected tests fill, and how the tests ended."""

    def __init__(self, columns: tuple[str, ...] = COLUMNS) -> None:
        self.columns = columns
        self.cells: dict[str, list[Cell]] = {}
        self.outcomes: dict[str, set[str]] = defaultdict(set)
        self.left_out: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests of the wanted columns."""
        for item in items:
            cells = [cell for cell in cells_of(item) if cell.column in self.columns]
            if cells:
                self.cells[item.nodeid] = cells
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.cells])
        items[:] = [item for item in items if item.nodeid in self.cells]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember test files that skip themselves because a package is missing."""
        if report.skipped:
            self.left_out.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember how set-up, call and tear-down ended."""
        self.outcomes[report.nodeid].add("failed" if hasattr(report, "wasxfail") else report.outcome)

    def result(self) -> Cells:
        """The text of each cell: the worst result of its tests."""
        outcomes: dict[Cell, set[str]] = defaultdict(set)
        for test, cells in self.cells.items():
            for cell in cells:
                outcomes[cell] |= self.outcomes[test] or {"failed"}
        return {cell: _summary(found) for cell, found in outcomes.items()}


def _summary(outcomes: set[str]) -> str:
    return "fails" if "failed" in outcomes else "skipped here" if "skipped" in outcomes else "yes"


def cells_of(item: pytest.Item) -> list[Cell]:
    """The cells a test fills.

    Raises:
        pytest.UsageError: a family or column that the table does not have.
    """
    cells = []
    for marker in item.iter_markers("compatibility"):
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        cell = Cell(marker.kwargs.get("family", parameters.get("family")), marker.kwargs.get("column"))
        if cell.family not in FAMILIES or cell.column not in COLUMNS:
            raise pytest.UsageError(f"{item.nodeid} is marked for {cell}: not in the table of {Path(__file__).name}.")
        cells.append(cell)
    return cells


def marked_files() -> list[str]:
    """Test files in which the marker is used."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.compatibility(" in file.read_text(encoding="utf-8")]


def collect() -> Recorder:
    """Collect the marked tests without running them."""
    return _pytest(Recorder(), "--collect-only")


def _pytest(recorder: Recorder, *options: str) -> Recorder:
    arguments = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*arguments, "-q", *options, *marked_files()], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest stopped with exit code {int(code)}: the table is left as it is.")
    return recorder


def read_table() -> Cells:
    """Read the cells of the table in docs/reference/compatibility.md."""
    table = _TABLE.search(TARGET.read_text(encoding="utf-8"))
    assert table is not None, f"{TARGET} has no table"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[0].splitlines() if line]
    names = {label: family for family, label in FAMILIES.items()}
    return {
        Cell(names[label], column): value
        for label, *values in rows[2:]
        if label in names
        for column, value in zip(rows[0][1:], values, strict=True)
    }


def render(cells: Cells) -> str:
    """The table as Markdown."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for family, label in FAMILIES.items():
        row = [cells.get(Cell(family, column), _untested(family, column)) for column in COLUMNS]
        lines.append(f"| {label} | {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def _untested(family: str, column: str) -> str:
    return NOTHING_TO_TEST if column == "generate" and family in _NOT_GENERATING else UNTESTED


def main() -> int:
    """Run the tests and write the table."""
    parser = argparse.ArgumentParser(description="Run the tests of docs/reference/compatibility.md, write its table.")
    parser.add_argument(
        "--columns", nargs="+", choices=COLUMNS, default=COLUMNS, help="Run only the tests of these columns."
    )
    columns = tuple(parser.parse_args().columns)
    recorder = _pytest(Recorder(columns))
    for name in recorder.left_out:
        print(f"left out: {name} skips itself; its cells are written as {UNTESTED!r}", file=sys.stderr)
    # Imported late: pytest warns about plugins that were imported before pytest could rewrite their assertions.
    from mola.files.atomic import atomic_write_text

    cells = {cell: value for cell, value in read_table().items() if cell.column not in columns} | recorder.result()
    page = TARGET.read_text(encoding="utf-8")
    print(atomic_write_text(TARGET, _TABLE.sub(lambda _: render(cells), page)))
    failing = sorted(cell for cell, value in recorder.result().items() if value == "fails")
    for cell in failing:
        print(f"fails: {cell.family}, {cell.column}", file=sys.stderr)
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())

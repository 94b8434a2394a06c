"""Which tests run which lines, and how long each takes: from one run of them with coverage."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from coverage import CoverageData

TESTS = ("tests/tuner", "tests/checkpoints")


class Covering:
    """Tests by line.

    Args:
        folder: where the run's results are, or will be.
        package: the folder of code whose lines are followed.
        longest: tests that take more seconds take no part.
    """

    def __init__(self, folder: Path, package: str, longest: float) -> None:
        data, times = folder / "coverage", folder / "junit.xml"
        if not times.exists():
            _run(data, times, package)
        self.seconds = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", "0"))
            for case in ET.parse(times).iter("testcase")
            if case.find("skipped") is None
        }
        self._chosen = {name for name, seconds in self.seconds.items() if seconds <= longest}
        coverage = CoverageData(str(data))
        coverage.read()
        self._by_line: dict[str, dict[int, set[str]]] = {}
        for path in coverage.measured_files():
            lines: dict[int, set[str]] = defaultdict(set)
            for line, contexts in coverage.contexts_by_lineno(path).items():
                lines[line] = {context.rsplit("|", 1)[0] for context in contexts} & self._chosen
            self._by_line[str(Path(path).relative_to(Path.cwd()))] = lines

    def tests(self, path: str, line: int, budget: float) -> list[str]:
        """Tests of a line, `budget` seconds in all; of its whole file if the line runs at import only.

        Those in the test file of the same name come first, then the fastest.
        """
        lines = self._by_line.get(path, {})
        names = lines.get(line) or set().union(*lines.values()) if lines else set()
        chosen, total = [], 0.0
        own = f"/test_{Path(path).stem}.py::"
        for name in sorted(names, key=lambda each: (own not in each, self.seconds[each], each)):
            total += self.seconds[name]
            if chosen and total > budget:
                break
            chosen.append(name)
        return chosen


def _run(data: Path, times: Path, package: str) -> None:
    part = times.with_suffix(".part")
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={part}", "-o", "junit_family=xunit1"]
    coverage = [f"--cov={package}", "--cov-branch", "--cov-context=test", "--cov-report=term-missing"]
    command = [sys.executable, "-m", "pytest", *TESTS, *options, *coverage]
    subprocess.run(command, check=True, env=os.environ | {"COVERAGE_FILE": str(data)})
    part.rename(times)

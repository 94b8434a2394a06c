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
        anew: run them even if there are results.
    """

    def __init__(self, folder: Path, package: Path, longest: float, *, anew: bool) -> None:
        data, times = folder / "coverage", folder / "junit.xml"
        if anew or not times.exists():
            _run(data, times, package)
        self.seconds = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", "0"))
            for case in ET.parse(times).iter("testcase")
            if case.find("skipped") is None
        }
        chosen = {name for name, seconds in self.seconds.items() if seconds <= longest}
        coverage = CoverageData(str(data))
        coverage.read()
        # By line, file and folder.
        self._by_place: dict[tuple[Path, int] | Path, set[str]] = defaultdict(set)
        for name in coverage.measured_files():
            for line, contexts in coverage.contexts_by_lineno(name).items():
                names = {context.rsplit("|", 1)[0] for context in contexts} & chosen
                path = Path(name)
                for place in ((path, line), path, path.parent):
                    self._by_place[place] |= names

    def tests(self, path: Path, line: int, budget: float) -> tuple[list[str], float]:
        """Tests of a line, `budget` seconds in all, and their seconds.

        Where no test is seen to run it, it runs at import: those of its file. Or numba has compiled it: those of its
        folder, since what calls compiled code is beside it. Tests in files of its name come first, then the fastest.
        """
        path = path.absolute()
        wider = path.parent if "numba" in path.read_text(encoding="utf-8") else path
        names = self._by_place[path, line] or self._by_place[wider]
        chosen, total = [], 0.0
        for name in sorted(names, key=lambda each: (_subject(each) not in path.stem, self.seconds[each], each)):
            if chosen and total + self.seconds[name] > budget:
                break
            chosen.append(name)
            total += self.seconds[name]
        return chosen, total


def _subject(test: str) -> str:
    return Path(test.partition("::")[0]).stem.removeprefix("test_")


def _run(data: Path, times: Path, package: Path) -> None:
    part = times.with_suffix(".part")
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={part}", "-o", "junit_family=xunit1"]
    coverage = [f"--cov={package}", "--cov-branch", "--cov-context=test", "--cov-report="]
    command = [sys.executable, "-m", "pytest", *TESTS, *options, *coverage]
    subprocess.run(command, check=True, env=os.environ | {"COVERAGE_FILE": str(data)})
    part.rename(times)

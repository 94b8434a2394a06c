"""Mutation test of the tuner: how many small faults in its code do tests notice?

    make mutation                              # 300 faults
    make mutation MUTATION="--limit 1000000"   # one at every place

Every fault runs the tests that run its line, the fastest first, until one fails. The result, with a line for each fault
that no test noticed, is written to FOLDER/result.json after every fault; the same command goes on with it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path

from scipy.stats import binomtest

from tests.mutation.covering import Covering
from tests.mutation.mutants import draw
from tests.mutation.running import import_what_tests_import, outcome

PACKAGE = Path("src/mola/tuner")


def main() -> None:
    """Run it."""
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    covering = Covering(options.folder, str(PACKAGE), options.longest)
    paths = [PACKAGE / name for name in options.files] if options.files else list(PACKAGE.glob("*.py"))
    mutants = draw(paths, options.seed, options.limit)
    result_file, log = options.folder / "result.json", options.folder / "log.txt"
    outcomes: dict[str, str] = json.loads(result_file.read_text())["outcomes"] if result_file.exists() else {}
    again = [mutant for mutant in mutants if outcomes.get(mutant.name, "survived") == "survived"]
    todo = again if options.again else [mutant for mutant in mutants if mutant.name not in outcomes]
    every_file = {name for mutant in todo for name in covering.tests(mutant.path, mutant.line, options.budget)[:1]}
    if todo:
        import_what_tests_import(sorted(every_file), log)
    for number, mutant in enumerate(todo, 1):
        tests = covering.tests(mutant.path, mutant.line, options.budget)
        expected = sum(covering.seconds[name] for name in tests)
        start = time.monotonic()
        outcomes[mutant.name] = outcome(mutant, tests, log, timeout=30 + 3 * expected)
        print(
            f"{number}/{len(todo)} {outcomes[mutant.name]:10} {time.monotonic() - start:5.1f} s  {mutant.name}",
            flush=True,
        )
        _write(result_file, options, outcomes)
    _show([outcomes[mutant.name] for mutant in mutants])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n")[0])
    parser.add_argument("--files", nargs="*", default=[], help="files of src/mola/tuner; all by default")
    parser.add_argument("--limit", type=int, default=300, help="number of faults, drawn from one at every place")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--budget", type=float, default=20, help="seconds of tests for a fault, when none fails")
    parser.add_argument("--longest", type=float, default=5, help="tests that take more seconds take no part")
    parser.add_argument("--again", action="store_true", help="run those again that survived")
    parser.add_argument("--folder", type=Path, default=Path(".cache/mutation"), help="where results are kept")
    return parser.parse_args()


def _write(path: Path, options: argparse.Namespace, outcomes: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    text = json.dumps({"seed": options.seed, "budget": options.budget, "outcomes": outcomes}, indent=1)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def _show(outcomes: list[str]) -> None:
    counts = Counter(outcomes)
    killed = sum(count for name, count in counts.items() if name.startswith("killed"))
    interval = binomtest(killed, len(outcomes)).proportion_ci(0.95, method="wilson")
    print(", ".join(f"{count} {name}" for name, count in counts.most_common()))
    print(f"score {killed / len(outcomes):.3f}, 95 % interval {interval.low:.3f} to {interval.high:.3f}")


if __name__ == "__main__":
    main()

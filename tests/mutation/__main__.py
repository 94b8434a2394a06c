"""Mutation test of the tuner: how many small faults in its code do tests notice?

    make mutation                              # 300 faults
    make mutation MUTATION="--limit 1000000"   # one at every place

cosmic-ray makes the faults and keeps the results. What its own runner has no setting for is here: a draw by a seed, and
for each fault only the tests that run its line, the fastest first, in a process that has imported torch already. The
same command goes on where it stopped; another version of src/ begins anew.
`cr-report --surviving-only --show-diff SESSION` shows what no test noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.modules import find_modules
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkItem, WorkResult
from scipy.stats import binomtest

from tests.mutation.covering import Covering
from tests.mutation.running import run_on

SOURCES, PACKAGE = Path("src"), Path("src/mola/tuner")


def main() -> None:
    """Run it."""
    options = _options()
    folder = options.folder / _digest(SOURCES)
    # Faults are put into a copy, which every start mends: a run that was killed leaves its last one behind.
    shutil.copytree(SOURCES, folder / SOURCES, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    os.environ["PYTHONPATH"] = str((folder / SOURCES).absolute())
    sys.path.insert(0, os.environ["PYTHONPATH"])  # which processes of multiprocessing take over
    covering = Covering(folder, folder / PACKAGE, options.longest, anew=options.again)
    path = folder / f"seed-{options.seed}.sqlite"
    with use_db(path) as session:
        if not session.num_work_items:
            session.add_work_items(draw(folder / PACKAGE, options.seed))
        places = [folder / PACKAGE / name for name in options.files or ("",)]
        items = sorted(session.work_items, key=lambda item: item.job_id)
        items = [item for item in items if any(map(item.mutations[0].module_path.is_relative_to, places))]
        items, results = items[: options.limit], dict(session.results)
        todo = [item for item in items if options.again or item.job_id not in results]
        todo = [item for item in todo if item.job_id not in results or not results[item.job_id].is_killed]
        for number, item in enumerate(todo, 1):
            (mutation,) = item.mutations
            tests, seconds = covering.tests(mutation.module_path, mutation.start_pos[0], options.budget)
            start = time.monotonic()
            result = run_on(mutation, tests, timeout=30 + 3 * seconds, log=folder / "log.txt")
            session.set_result(item.job_id, result)
            results[item.job_id] = result
            took = f"{time.monotonic() - start:5.1f} s"
            print(f"{number}/{len(todo)} {_word(result):9} {took}  {_name(mutation, folder / PACKAGE)}", flush=True)
    print(f"session: {path}")
    _show([results[item.job_id] for item in items])


def draw(package: Path, seed: int) -> list[WorkItem]:
    """One fault for every place and kind, in random order.

    Args:
        package: folder of the code.
        seed: of the drawing.
    """
    # Kernels for GPUs are left out: their tests take a minute at a time, in processes that nobody sees run them.
    modules = [path for path in find_modules([package]) if path.parent.name != "gpu"]
    with use_db(":memory:") as everything:
        init(sorted(modules), everything, {})
        mutations = [item.mutations[0] for item in everything.work_items]
    # Nearly all of these change `X | None`, which is an annotation, and never evaluated.
    mutations = [mutation for mutation in mutations if "_BitOr_" not in mutation.operator_name]
    mutations.sort(key=lambda each: (each.module_path, each.start_pos, each.operator_name, each.occurrence))
    random.Random(seed).shuffle(mutations)
    drawn = {(each.module_path, each.start_pos, each.operator_name.split("_")[0]): each for each in mutations}
    return [WorkItem.single(f"{number:06}", mutation) for number, mutation in enumerate(drawn.values())]


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    texts = (str(path).encode() + path.read_bytes() for path in files if ".egg-info" not in str(path))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n")[0])
    parser.add_argument("--files", nargs="*", default=[], help=f"files and folders of {PACKAGE}; all by default")
    parser.add_argument("--limit", type=int, default=300, help="number of faults, drawn from one at every place")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--budget", type=float, default=20, help="seconds of tests for a fault, when none fails")
    parser.add_argument("--longest", type=float, default=5, help="tests that take more seconds take no part")
    parser.add_argument("--again", action="store_true", help="run those again that survived, with the tests of now")
    parser.add_argument("--folder", type=Path, default=Path(".cache/mutation"), help="where results are kept")
    return parser.parse_args()


def _name(mutation: MutationSpec, package: Path) -> str:
    line, column = mutation.start_pos
    operator = mutation.operator_name.removeprefix("core/")
    return f"{mutation.module_path.relative_to(package)}:{line}:{column} {operator}"


def _word(result: WorkResult) -> str:
    return str((result.test_outcome or result.worker_outcome).value) if result.output else "uncovered"


def _show(results: list[WorkResult]) -> None:
    killed = sum(result.test_outcome == TestOutcome.KILLED for result in results)
    interval = binomtest(killed, len(results)).proportion_ci(0.95, method="wilson")
    print(", ".join(f"{count} {name}" for name, count in Counter(map(_word, results)).most_common()))
    print(f"score {killed / len(results):.3f}, 95 % interval {interval.low:.3f} to {interval.high:.3f}")


if __name__ == "__main__":
    main()

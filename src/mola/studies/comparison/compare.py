"""`mola compare`: recipes x tasks x seeds, trained, tested and compared on the same questions.

    mola compare --base_model my-model --data mine.jsonl
    mola compare --config study.yaml

- Every run does the work of `mola train`, then of `mola evaluate`.
- With `tune`, options are chosen first, in the same way for each recipe, with seeds and questions that the comparison
  does not use.
- Each finished run is written to the record at once. The same command resumes a stopped comparison, without repeating
  finished runs.
- Several processes with the same command share the work: a run belongs to the process that holds its lock.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock, Timeout
from rich.markup import escape
from rich.table import Table

from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, atomic_write_text, check_writable
from mola.files.terminal import make_table_console
from mola.reporting.formatting import duration
from mola.studies.comparison.checks import Run, check_runs, check_search
from mola.studies.comparison.conclusion import conclusion
from mola.studies.comparison.default_recipes import default_recipes
from mola.studies.comparison.drawn_rows import draw_test_rows
from mola.studies.comparison.options import CompareOptions, Key
from mola.studies.comparison.outcomes import ACCURACY, LOSS
from mola.studies.comparison.record import BASE, FORMAT, Result, check_same, read_results
from mola.studies.comparison.runs import evaluate_base_model, remove_checkpoints, remove_weights, train_and_test
from mola.studies.comparison.search import Found, search_results, search_table
from mola.studies.comparison.tables import Row, comma_separated, markdown, notes, summarize, terminal_tables
from mola.studies.train_and_test import recorded, sigterm_as_interrupt
from mola.training.run_record import without_token

__all__ = ["CompareOptions", "CompareResult", "compare", "main"]

logger = logging.getLogger(__name__)

RECORD_FILE = "compare.json"
_POLL_SECONDS = 5.0  # between two looks at the results of other processes


@dataclass
class CompareResult:
    """The results of a comparison so far."""

    status: str  # "finished", or "interrupted" by a signal
    rows: list[Row]  # the table, see `mola.studies.comparison.tables.Row`
    results: list[Result]  # every finished run
    open: int  # number of runs left
    record: str  # the file with all results and settings
    found: list[Found]  # the choices of the search, see `mola.studies.comparison.tables.Found`


def compare(options: CompareOptions) -> CompareResult:
    """Train and test the runs that are not finished yet, and compare all runs.

    Args:
        options: see `CompareOptions`.

    Returns:
        The result. The file `record` contains it, too, with the settings that produced it.

    Raises:
        MolaError: options or data of any run are wrong (before the first is trained), or the record holds results of
            different settings.
    """
    path = Path(options.record or Path(options.output_dir or "") / RECORD_FILE)
    _check_files(options, is_new=not path.exists())
    read_results(path)  # a damaged record fails before the data are read
    if options.is_short:
        options.use_recipes(default_recipes(options))
    draw_test_rows(options)
    searched, runs = (check_runs(each, options.is_short) for each in (options.tuning_runs, options.runs))
    check_search(searched, runs)
    _log_plan(options, searched, runs)
    with sigterm_as_interrupt():
        return _Comparison(options, searched, runs, path).run()


def main(options: CompareOptions) -> int:
    """Run the command and print the table; the exit code is 130 after an interruption."""
    result = compare(options)
    console = make_table_console()
    if result.found:
        header, lines = search_table(result.found)
        table = Table(*map(escape, header), title="search")
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
    reference = str(options.reference)
    for table in terminal_tables(result.rows, reference):
        console.print(table)
    for note in notes(result.rows, reference, result.results):
        console.print(escape(note))
    for text in ("", *conclusion(options, result.rows, result.results)):
        console.print(escape(text), highlight=False, soft_wrap=True)
    print(f"{result.status}, {result.open} runs left; all numbers are in {result.record}", file=sys.stderr)
    if result.status == "interrupted":
        print("Resume with the same command.", file=sys.stderr)
    return 0 if result.status == "finished" else 130


def _check_files(options: CompareOptions, is_new: bool) -> None:
    """Check the output files before the training: a new comparison must not replace a file."""
    check_writable(Path(options.output_dir or "") / RECORD_FILE)
    for path in _paths(options.tables):
        if path.suffix not in (".csv", ".md"):
            raise MolaError(f"`tables` must be files that end in .csv, .md: got {str(path)!r}.")
        if is_new and path.exists():
            raise MolaError(f"`tables` must be new files: {str(path)!r} exists. Remove it, or pass a different name.")
        check_writable(path)


def _log_plan(options: CompareOptions, searched: Sequence[Run], runs: Sequence[Run]) -> None:
    tests = {run.key.task: run for run in runs}
    logger.info(
        "%d runs: %s x seeds %s%s. Test: %s.",
        len(searched) + len(runs),
        ", ".join(options.recipes or {}),
        ", ".join(map(str, options.seeds or [])),
        f", and {len(searched)} runs of the search" if searched else "",
        ", ".join(
            f"{run.num_questions} {'questions' if run.is_scored else 'rows'} of {task}" for task, run in tests.items()
        ),
    )


def _paths(names: str | None) -> list[Path]:
    return [Path(name.strip()) for name in (names or "").split(",") if name.strip()]


class _Comparison:
    """Does the runs that are left and keeps the record up to date."""

    def __init__(self, options: CompareOptions, searched: Sequence[Run], runs: Sequence[Run], path: Path) -> None:
        self.options = options
        self.searched = searched
        self.runs = runs  # replaced after the search by runs with the chosen options
        self.path = path
        self.folder = Path(options.output_dir or "")
        self.results: list[Result] = []
        self.found: list[Found] = []
        self.seconds: dict[str, list[float]] = {}  # recipe -> wall times of the runs that this process has done
        self._read_record()

    def run(self) -> CompareResult:
        """Train and test until the end or a signal, and write the output files."""
        status = recorded(self._do_all, self._write)
        rows, left = self._write(status), len(self._left(self.searched)) + len(self._left(self.runs))
        for path in _paths(self.options.tables):
            if path.suffix == ".csv":
                atomic_write_text(path, comma_separated(rows))
            else:
                text = markdown(rows, self.found, str(self.options.reference), self._compared(), left)
                atomic_write_text(path, text)
        return CompareResult(status, rows, self.results, left, str(self.path), self.found)

    def _do_all(self) -> bool:
        """Do all runs; returns False if a signal stopped a training."""
        if self.options.evaluate_base:
            self._test_base()
        if not self._do_runs(self.searched):
            return False
        if self.searched:
            self.found = search_results(self.options, self.results)
            chosen = {(each.task, each.recipe): each.chosen for each in self.found}
            self.runs = check_runs(self.options.tuned_runs(chosen), self.options.is_short)
            self._read_record()
        return self._do_runs(self.runs)

    def _test_base(self) -> None:
        for task in self.options.tasks or {}:
            run = next(run for run in self.runs if run.key.task == task)
            with self._lock(f"base-{task}"):
                self._read_record()
                if Key(task, BASE, 0) not in {result.key for result in self.results}:
                    self._add(evaluate_base_model(run, self.folder / task / "base.json"))

    def _do_runs(self, runs: Sequence[Run]) -> bool:
        """Do the runs that no process is doing, then wait for the other processes, and do the runs that they leave.

        Returns False if a signal stopped a training.
        """
        while left := self._left(runs):
            is_idle = True
            for run in left:
                try:
                    lock = self._lock("-".join(map(str, run.key))).acquire(blocking=False)
                except Timeout:
                    continue  # a different process is doing this run
                with lock:
                    self._read_record()
                    if run not in self._left(runs):
                        continue
                    is_idle = False
                    logger.info("Run %d of %d: %s.", 1 + runs.index(run), len(runs), run.key)
                    start = time.perf_counter()
                    result = train_and_test(run)
                    if result is None:
                        return False
                    if result.diverged_at is not None:
                        what = (ACCURACY if run.is_scored else LOSS).diverged
                        logger.warning("The training of %s diverged: %s.", run.key, what)
                    remove_checkpoints(run)  # before the record, so that a process that ends here leaves none
                    self._add(result)
                    self._log_time_left(run, time.perf_counter() - start)
                    if not self.options.keep_adapters:
                        remove_weights(run)
            if is_idle:
                time.sleep(_POLL_SECONDS)
                self._read_record()
        return True

    def _log_time_left(self, run: Run, seconds: float) -> None:
        """Log how long the runs that are left may take: as long as runs of the same recipe, or of any."""
        self.seconds.setdefault(run.key.plain_recipe, []).append(seconds)
        mean = fmean(each for times in self.seconds.values() for each in times)
        open_runs = [*self._left(self.searched), *self._left(self.runs)]
        left = [self.seconds.get(each.key.plain_recipe, [mean]) for each in open_runs]
        if left:
            total = duration(sum(map(fmean, left)))
            runs = "1 run that is left takes" if len(left) == 1 else f"{len(left)} runs that are left take"
            logger.info("%s took %s. The %s about %s.", run.key, duration(seconds), runs, total)

    def _left(self, runs: Sequence[Run]) -> list[Run]:
        done = {result.key for result in self.results}
        return [run for run in runs if run.key not in done]

    def _compared(self) -> list[Result]:
        """Results of this comparison's runs and of the base model. The record may hold more results."""
        keys = {run.key for run in self.runs}
        return [each for each in self.results if each.key in keys or each.recipe == BASE]

    def _lock(self, name: str) -> FileLock:
        """A lock among the processes of this comparison; not a soft one, which a killed process would keep."""
        return FileLock(self.folder / ".locks" / name, fallback_to_soft=False)

    def _read_record(self) -> None:
        """Add the results that other processes have written.

        Raises:
            MolaError: a result was made with different options than its run has now.
        """
        known = {result.key for result in self.results}
        self.results += [result for result in read_results(self.path) if result.key not in known]
        is_chosen = bool(self.found) or not self.searched
        check_same([each for each in self.results if is_chosen or each.recipe == BASE], self.runs)
        check_same([each for each in self.results if each.recipe != BASE], self.searched)

    def _add(self, result: Result) -> None:
        self.results.append(result)
        self._write("running")

    def _write(self, status: str, **more: Any) -> list[Row]:
        with self._lock("record"):
            self._read_record()
            recipes, tasks = self.options.recipes or {}, self.options.tasks or {}
            rows = summarize(self._compared(), [*recipes], [*tasks], str(self.options.reference))
            content = {
                "format": FORMAT,
                "status": status,
                # Users may share the record, so it contains no folder of this machine and no secret.
                "command": without_token([Path(sys.argv[0]).name, *sys.argv[1:]], self.options.hub_token),
                "recipes": recipes,
                "tasks": tasks,
                **more,
                "search": [asdict(each) for each in self.found],
                "summary": {"reference": self.options.reference, "rows": [asdict(row) for row in rows]},
                "runs": [asdict(each) for each in self.results],
            }
            atomic_write_json(self.path, content)
        return rows

"""`mola compare`: recipes x tasks x seeds, trained, tested and compared on the same questions.

- Every run is one of `mola train` followed by one of `mola evaluate`.
- With `tune`, options are chosen first, for each recipe alike, on seeds and questions that the comparison does not use.
- Each finished run is in the record at once. Stopped at any moment, the same command goes on; nothing is repeated.
- Several processes with the same command share the work: a run belongs to the process that holds its lock.
- The table has intervals over seeds and over questions, and says which differences are significant.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from mola.errors import MolaError, NotFiniteError
from mola.evaluation.evaluate import evaluate
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.locks import POLL_SECONDS, held
from mola.files.terminal import table_console
from mola.studies.comparison.allocations import Allocations, probed_by
from mola.studies.comparison.begun import begin_or_go_on
from mola.studies.comparison.checks import Run, check_runs, check_search
from mola.studies.comparison.contrasts import Contrast, contrasts
from mola.studies.comparison.notes import effort_line, power_line, time_left
from mola.studies.comparison.options import CompareOptions, Key
from mola.studies.comparison.outputs import Outcome, check_files, write_plots, write_tables
from mola.studies.comparison.plots import bands
from mola.studies.comparison.record import BASE, FORMAT, Record, Result, check_same, read_record
from mola.studies.comparison.runs import base_result_of, diverged_result_of, remove_weights, train_and_test
from mola.studies.comparison.summary import Row, summarize
from mola.studies.comparison.tables import search_tables, terminal_tables
from mola.studies.comparison.tuning import Found, Power, found_by_search, power_of
from mola.studies.train_and_test import evaluate_once, free_memory, recorded, signals_as_interrupt, stop_if_asked
from mola.training.hub import without_token

__all__ = ["CompareOptions", "CompareResult", "compare", "main"]

logger = logging.getLogger(__name__)

RECORD_FILE = "compare.json"


@dataclass
class CompareResult:
    """What a comparison has so far."""

    status: str  # "finished", or "interrupted" by a signal
    rows: list[Row]  # the table, see `mola.studies.comparison.summary.Row`
    results: list[Result]  # every finished run
    open: int  # how many runs are left
    record: str  # the file with everything
    found: list[Found]  # what the search has chosen, see `mola.studies.comparison.tuning.Found`
    power: list[Power]  # what a comparison with these seeds can see, by the search
    contrasts: list[Contrast]  # recipes compared with each other


def compare(options: CompareOptions) -> CompareResult:
    """Train and test what is not done yet, and compare.

    Args:
        options: see `CompareOptions`.

    Returns:
        The result; the file `record` has the same and how it was made.

    Raises:
        MolaError: options or data of any run are wrong (before the first is trained), the record holds results of
            other settings, a probe has diverged, or what the base model itself answers is no number.
    """
    path = Path(options.record or Path(options.output_dir or "") / RECORD_FILE)
    check_writable(Path(options.output_dir or "") / RECORD_FILE)
    is_new, record = not path.exists(), read_record(path)
    check_files(options.tables, options.plots, is_new)
    searched = check_runs(options, options.tuning_runs)
    runs = check_runs(options, options.runs)
    check_search(searched, runs)
    check_same([each for each in record.results if each.recipe != BASE], searched)  # which other questions are asked
    comparison = _Comparison(options, searched, runs, record, path)
    comparison.settle()
    with signals_as_interrupt():
        return comparison.run()


def main(options: CompareOptions) -> int:
    """Run the command and print the tables; the exit code is 130 after an interruption."""
    result = compare(options)
    console = table_console()
    for table in [
        *search_tables(result.found),
        *terminal_tables(result.rows, str(options.reference), result.contrasts),
    ]:
        console.print(table)
    for line in [*map(power_line, result.power), effort_line(result.results)]:
        console.print(escape(line))
    print(f"{result.status}, {result.open} runs left; all numbers are in {result.record}", file=sys.stderr)
    if result.status == "interrupted":
        print("Go on with the same command.", file=sys.stderr)
    return 0 if result.status == "finished" else 130


class _Comparison:
    """Does what is left and keeps the record up to date."""

    def __init__(
        self, options: CompareOptions, searched: Sequence[Run], runs: Sequence[Run], record: Record, path: Path
    ) -> None:
        self.options = options
        self.searched = searched
        self.runs = runs
        self.results = record.results
        self.path = path
        self.folder = Path(options.output_dir or "")
        self.locks = self.folder / ".locks"
        self.allocations = Allocations(self.folder)
        self.allocations.known |= record.allocations
        self.found: list[Found] = []
        self.power: list[Power] = []
        self.asked_base: set[str] = set()  # fingerprints of more questions that the base has answered with numbers

    def settle(self) -> None:
        """Take over what the search has chosen, as soon as it is complete; refuse results of other options."""
        if self._open(self.searched):
            return
        if self.searched:
            self.found = found_by_search(self.options, self.results)
            questions = {run.key.task: run.num_questions for run in self.runs}
            self.power = power_of(self.options, self.results, self.found, questions)
            chosen = {(each.task, each.recipe): each.chosen for each in self.found}
            self.runs = check_runs(self.options, self.options.tuned_runs(chosen))
        check_same(self.results, self.runs)

    def run(self) -> CompareResult:
        """Train and test until the end or a signal."""
        with held(self.locks / "allocations", waits=True):
            left = [*self._open(self.searched), *self._open(self.runs)]
            self.allocations.make_and_check(left, {result.key: result for result in self.results})
        status = recorded(self._everything, self._write)
        rows, pairs = self._write(status)
        result = CompareResult(
            status, rows, self.results, self._num_open(), str(self.path), self.found, self.power, pairs
        )
        shown = self._asked_for()
        curves = {task: bands(shown, task, [*(self.options.recipes or {})]) for task in self.options.tasks or {}}
        effort, reference = effort_line(self.results), str(self.options.reference)
        outcome = Outcome(rows, reference, self.found, self.power, curves, effort, pairs, result.open)
        write_tables(self.options.tables, outcome)
        if status == "finished":
            write_plots(self.options.plots, self.options, shown, outcome)
        return result

    def _asked_for(self) -> list[Result]:
        """Results of these tasks, recipes and seeds: of others nobody has compared the settings, see `check_same`."""
        keys = {run.key for run in self.runs}
        return [each for each in self.results if each.key in keys or each.recipe == BASE]

    def _open(self, runs: Sequence[Run]) -> list[Run]:
        """Those without a result."""
        done = {result.key for result in self.results}
        return [run for run in runs if run.key not in done]

    def _num_open(self) -> int:
        return len(self._open(self.searched)) + len(self._open(self.runs))

    def _everything(self) -> bool:
        if self.searched and not self.found:  # also if others have finished the search since this process began
            if not self._all_runs(self.searched):
                return False
            self.settle()
            for line in map(power_line, self.power):
                logger.info("%s", line)
        if self.options.evaluate_base:
            self._test_base()
        return self._all_runs(self.runs)

    def _all_runs(self, runs: Sequence[Run]) -> bool:
        """What nobody has done or is doing; then wait for the others, and do what they leave."""
        while left := self._read_again(runs):
            is_idle = True
            for run in left:
                stop_if_asked()
                with held(self.locks / "-".join(map(str, run.key)), waits=False) as is_mine:
                    if is_mine and run in self._read_again(runs) and self._is_ready(run):
                        is_idle = False
                        cost = time_left(self.results, self._num_open())
                        logger.info("Run %d of %d: %s%s.", 1 + runs.index(run), len(runs), run.key, cost)
                        if not self._one(run, runs):
                            return False
            if is_idle:
                time.sleep(POLL_SECONDS)
        return True

    def _is_ready(self, run: Run) -> bool:
        """Whether the probe of a run is done."""
        return run.probe is None or Key(run.key.task, run.probe, run.key.seed) in {each.key for each in self.results}

    def _one(self, run: Run, runs: Sequence[Run]) -> bool:
        folder = Path(run.options.output_dir or "")
        if run.allocation is not None:
            for name, value in self.allocations.options(run).items():
                setattr(run.options, name, value)
        begin_or_go_on(folder, run.identity)
        diverged: NotFiniteError | None = None
        try:
            result = train_and_test(run)
        except NotFiniteError as error:
            diverged = error.with_traceback(None)  # which would hold what the training had in memory
        if diverged is not None:
            result = self._diverged(run, diverged, runs)
        if result is None:
            return False
        for other in probed_by(run, self._open(runs)):  # first: who finds the result takes them from the record
            self.allocations.make(other, adapter=str(folder))
        self._add(result)
        if not self.options.keep_adapters:
            remove_weights(folder)
        return True

    def _diverged(self, run: Run, error: NotFiniteError, runs: Sequence[Run]) -> Result | None:
        """The result of such a run; None if a signal had asked to stop.

        Raises:
            MolaError: the run is a probe, or the base model's own answers are no numbers: no recipe is to blame.
        """
        free_memory()
        if error.was_interrupted:
            return None
        answered = {each.fingerprints["test"] for each in self.results if each.recipe == BASE} | self.asked_base
        if (questions := run.fingerprints["test"]) not in answered:
            evaluate(replace(run.test, adapter=None, output=None))
            self.asked_base.add(questions)
        if probed := probed_by(run, self._open(runs)):
            raise MolaError(f"{run.key} is the probe of {probed[0].key} and has diverged: {error}") from error
        logger.warning("All answers of %s count as wrong: %s", run.key, error)
        return diverged_result_of(run)

    def _test_base(self) -> None:
        first: dict[str, Run] = {}
        for run in self.runs:
            first.setdefault(run.key.task, run)
        for task, run in first.items():
            with held(self.locks / f"base-{task}", waits=True):
                self._read_again(self.runs)
                if Key(task, BASE, 0) not in {result.key for result in self.results}:
                    path = self.folder / task / "base.json"
                    begin_or_go_on(path, run.base_identity)
                    test = replace(run.test, output=str(path))
                    self._add(base_result_of(run, evaluate_once(test, run.fingerprints["test"])))

    def _add(self, result: Result) -> None:
        self.results.append(result)
        self._write("running")

    def _read_again(self, runs: Sequence[Run]) -> list[Run]:
        """Take in what other processes have finished, which work on the same record; what is left of these runs."""
        record, known = read_record(self.path), {result.key for result in self.results}
        new = [result for result in record.results if result.key not in known]
        check_same([each for each in new if each.recipe != BASE], self.searched)
        if self.found or not self.searched:  # before, nobody knows the options of the runs
            check_same(new, self.runs)
        self.results += new
        self.allocations.known |= record.allocations
        return self._open(runs)

    def _write(self, status: str, **more: Any) -> tuple[list[Row], list[Contrast]]:
        recipes, tasks, reference = self.options.recipes, self.options.tasks, str(self.options.reference)
        assert isinstance(recipes, dict)
        assert isinstance(tasks, dict)
        with held(self.locks / "record", waits=True):
            self._read_again(self.runs)
            shown = self._asked_for()
            rows = summarize(shown, [*recipes], [*tasks], reference, self.options.target_accuracy)
            pairs = contrasts(shown, self.options.pairs, [*tasks])
            content = {
                "format": FORMAT,
                "status": status,
                # It may be passed on: no folder of this machine, no secret.
                "command": without_token([Path(sys.argv[0]).name, *sys.argv[1:]], self.options.hub_token),
                "recipes": recipes,
                "tasks": tasks,
                **more,
                "allocations": self.allocations.known,
                "search": [asdict(each) for each in self.found],
                "power": [asdict(each) for each in self.power],
                "summary": {
                    "reference": reference,
                    "rows": [asdict(row) for row in rows],
                    "contrasts": [asdict(each) for each in pairs],
                },
                "runs": [asdict(each) for each in self.results],
            }
            atomic_write_json(self.path, content)
        return rows, pairs

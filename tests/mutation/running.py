"""Runs tests on a fault, in a fork of a process that has imported everything but mola."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path

from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult

_IMPORTED = ("pytest", "hypothesis", "numba", "torch", "peft", "transformers", "transformers.trainer", "datasets")
# Plugins of pytest are imported already, which it warns of; the tests make errors of warnings.
_OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
_NOTICED = (1, 2, 4)  # pytest's exit codes: of a test; of a test file, a conftest with an error


def run_on(mutation: MutationSpec, tests: Sequence[str], timeout: float, log: Path) -> WorkResult:
    """The result of tests on a mutation: killed, also by time or a signal, or survived; the latter without tests.

    Args:
        mutation: what is changed, while they run.
        tests: names, which pass on the code as it is.
        timeout: seconds.
        log: file for pytest's output.
    """
    if not tests:
        return WorkResult(WorkerOutcome.NO_TEST, test_outcome=TestOutcome.SURVIVED)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two faults of one size within a second would be taken for one
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    with use_mutation(mutation.module_path, get_operator(mutation.operator_name)(), mutation.occurrence) as texts:
        process = context.Process(target=_run, args=(tests, log))
        process.start()
        process.join(timeout)
        code = process.exitcode
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    diff = "\n".join(unified_diff(*(text.splitlines() for text in texts), lineterm=""))
    outcome = TestOutcome.SURVIVED if code == 0 else TestOutcome.INCOMPETENT
    if code is None or code < 0 or code in _NOTICED:
        outcome = TestOutcome.KILLED
    return WorkResult(WorkerOutcome.NORMAL, log.read_text(errors="replace") or f"exit code {code}", outcome, diff)


def _run(tests: Sequence[str], log: Path) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import pytest

    sys.exit(int(pytest.main([*_OPTIONS, *tests])))

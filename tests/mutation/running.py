"""Runs tests on a mutant: in a fork of a process that has imported everything but mola."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

import pytest

from tests.mutation.mutants import Mutant

_OWN = ("mola", "tests", "conftest")
# Plugins of pytest are imported already, which it warns of; the tests make errors of warnings.
_OPTIONS = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
_FAILED, _INTERRUPTED, _USAGE = 1, 2, 4  # pytest's exit codes: of a test; of a test file, a conftest with an error


class _Mutated(importlib.abc.MetaPathFinder):
    """Imports one module from another source."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.path.removeprefix("src/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.path, self.source = str(Path(mutant.path).absolute()), mutant.source()

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        """The spec of the module; None for others."""
        if fullname != self.name:
            return None
        source = self.source

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return compile(source, self.path, "exec")

        return importlib.util.spec_from_file_location(fullname, self.path, loader=Loader(fullname, self.path))


def import_what_tests_import(tests: Sequence[str], log: Path) -> None:
    """Import into this process what the tests import, apart from mola; they must pass.

    Raises:
        RuntimeError: they fail without any fault in the code.
    """
    names = log.with_suffix(".modules")
    code = _fork(None, tests, log, timeout=1200, names=names)
    if code != 0:
        raise RuntimeError(f"the tests must pass without a fault: pytest ended with {code}, see {log}")
    for name in json.loads(names.read_text()):
        if name.split(".")[0] not in _OWN:
            try:
                importlib.import_module(name)
            except Exception:  # a part that can not be imported alone: the tests import it later
                continue


def outcome(mutant: Mutant, tests: Sequence[str], log: Path, timeout: float) -> str:
    """`killed`, `killed by time`, `survived`, or `uncovered` (no test runs the line)."""
    if not tests:
        return "uncovered"
    code = _fork(mutant, tests, log, timeout)
    if code is None:
        return "killed by time"
    if code == 0:
        return "survived"
    # A process that dies of a signal was noticed as well.
    return "killed" if code in (_FAILED, _INTERRUPTED, _USAGE) or code < 0 else f"pytest ended with {code}"


def _fork(
    mutant: Mutant | None, tests: Sequence[str], log: Path, timeout: float, names: Path | None = None
) -> int | None:
    """Exit code of pytest in a child process; minus the signal that ended it; None if it took too long."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if mutant is not None:
                sys.meta_path.insert(0, _Mutated(mutant))
            code = int(pytest.main([*_OPTIONS, *tests]))
            if names is not None:
                names.write_text(json.dumps(sorted(sys.modules)))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

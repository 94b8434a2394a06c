"""`python -m tests.peft_suite`: fetch PEFT's tests, run them with `MolaConfig`, judge, and write the page."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from mola.errors import MolaError
from mola.options.fields import option
from mola.options.parsing import parse
from tests.peft_suite.lists import Lists
from tests.peft_suite.models import write_models
from tests.peft_suite.report import Result, markdown, write_page
from tests.peft_suite.source import PACKAGE, fetch_tests

PROJECT = Path(__file__).resolve().parents[2]
PAGE = PROJECT / "docs" / "research" / "peft-suite.md"
FILES = (
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_low_level_api",
    "test_mapping",
    "test_other",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_tuners_utils",
)
_NEEDED = ("diffusers", "parameterized")  # by PEFT's tests, on import


@dataclass
class SuiteOptions:
    """Options of `python -m tests.peft_suite`."""

    cache: str = option(str(PROJECT / ".cache" / "peft-suite"), "Folder for PEFT's tests, kept from run to run.")
    only: str | None = option(None, "A pytest -k expression: run what it selects, and do not look for stale entries.")
    write_page: bool = option(False, "Write the result into docs/research/peft-suite.md, if everything holds.")

    def __post_init__(self) -> None:
        if self.only is not None and self.write_page:
            raise MolaError("`write_page` needs the whole result: leave `only` out.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if every test passed or failed as listed, and every entry of the list was met; else 1; 2 for wrong input.
    """
    try:
        options = parse(
            SuiteOptions,
            sys.argv[1:] if arguments is None else arguments,
            prog="python -m tests.peft_suite",
            summary="PEFT's own tests, run with MolaConfig.",
        )
        return run(options)
    except MolaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def run(options: SuiteOptions) -> int:
    """Fetch, run, judge.

    Raises:
        MolaError: a needed package is missing, or PEFT's tests cannot be had.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MolaError(f"PEFT's tests need {' and '.join(missing)}: pip install {' '.join(missing)}.")
    lists = Lists.load()
    folder = fetch_tests(Path(options.cache).resolve())
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        write_models(Path(scratch) / "hub")
        code = _pytest(folder, Path(scratch), options.only)
        result = Result.read(Path(scratch) / "result.json")
    stale = result.stale(lists) if options.only is None else []
    for tests in stale:
        print(f"Stale entry of not_applicable.yaml, no test failed under it: {tests}", file=sys.stderr)
    print(f"{result.total('passed')} passed, {result.total('listed')} do not apply, {result.total('failed')} failed.")
    if code != 0 or stale:
        return 1
    if options.write_page:
        write_page(PAGE, markdown(result, lists))
    return 0


def _pytest(folder: Path, scratch: Path, only: str | None) -> int:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(scratch / "hub"),
        "PYTHONPATH": os.pathsep.join((str(folder), str(PROJECT))),
    }
    # Not this project's settings: PEFT's tests are free to warn.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command += ["-p", "tests.peft_suite.plugin", "--suite-result", str(scratch / "result.json")]
    command += ["--quiet", "--tb=short", "-rfE", "--disable-warnings"]
    command += ["-k", only] if only is not None else []
    command += [str(folder / PACKAGE / f"{name}.py") for name in FILES]
    return subprocess.run(command, env=environment, cwd=scratch).returncode


if __name__ == "__main__":
    sys.exit(main())

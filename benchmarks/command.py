"""The benchmarks' command line: it measures suite by suite, prints tables, and writes JSON row by row."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from benchmarks.cases import check_compiler, check_model, choose_device, prepare_torch
from benchmarks.curve import curve
from benchmarks.decode import decode
from benchmarks.errors import in_one_line
from benchmarks.growth import growth
from benchmarks.models import PROJECT, model_folder
from benchmarks.options import BenchmarkOptions
from benchmarks.questions import attention, logits
from benchmarks.redundancy import redundancy
from benchmarks.tables import tables
from benchmarks.telemetry import telemetry
from benchmarks.text import check_text
from benchmarks.training import counts, memory, step
from mola._process import KEEP_MEMORY, MALLOC_VARIABLES, keep_freed_memory
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.files.terminal import make_table_console
from mola.options.parsing import parse

logger = logging.getLogger("benchmarks")

RUN = {
    "step": step,
    "memory": memory,
    "counts": counts,
    "decode": decode,
    "growth": growth,
    "curve": curve,
    "telemetry": telemetry,
    "logits": logits,
    "attention": attention,
    "redundancy": redundancy,
}


@in_one_line("benchmarks")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        arguments: the command line without the program; None takes the process's own.

    Returns:
        The exit code: 0, 2 for wrong input, 130 after an interruption.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    # PEFT reads a property of Transformers under its old name, which is not mola's concern.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        options = parse(BenchmarkOptions, arguments, prog="python -m benchmarks", summary=sys.modules[__name__].__doc__)
        run(options, arguments)
    except KeyboardInterrupt:
        print("benchmarks: interrupted; what was finished is in the JSON file", file=sys.stderr)
        return 130
    return 0


def run(options: BenchmarkOptions, arguments: Sequence[str] = ()) -> Path:
    """Measure, print and write.

    Args:
        options: what to measure.
        arguments: the command line, which the JSON file records.

    Returns:
        The JSON file.

    Raises:
        MolaError: an option does not fit; raised before the first measurement if it can be known by then.
    """
    device = choose_device(options.device)
    if options.keep_memory:
        _keep_memory()
    check_compiler(options)
    prepare_torch(device, options.threads)
    output = _output(options)
    record = _record(options, arguments, device)
    console = make_table_console()
    for name in options.model:
        if name != "random12":
            with model_folder(name, options.seed) as folder:
                check_model(options, folder)
                check_text(options, folder)
    for name in options.model:
        with model_folder(name, options.seed) as folder:
            check_model(options, folder)
            for suite in options.suite:
                start = time.perf_counter()
                rows, results = [], record["results"].setdefault(suite, [])
                for row in RUN[suite](options, name, folder):
                    rows.append(row)
                    results.append(row)
                    atomic_write_json(output, record)  # a suite may take an hour and be interrupted
                record["suite_seconds"].setdefault(name, {})[suite] = round(time.perf_counter() - start, 1)
                atomic_write_json(output, record)
                for table in tables(suite, rows):
                    console.print(table)
    console.print(f"Written to {output}.", highlight=False, markup=False, soft_wrap=True)
    return output


def _keep_memory() -> None:
    """Keep freed memory in this process and, through the environment, in the processes that suites start."""
    if not keep_freed_memory():
        raise MolaError(
            f"`keep_memory` needs glibc's malloc, and none of {', '.join(MALLOC_VARIABLES)} in the environment. Unset "
            "these, or leave it out."
        )
    os.environ.update(KEEP_MEMORY)


def _output(options: BenchmarkOptions) -> Path:
    if options.output is None:
        now = datetime.now()
        return check_writable(f"results/benchmarks-{now:%Y%m%d-%H%M%S}.json")
    if Path(options.output).exists() and not options.overwrite:
        raise MolaError(
            f"`output` must be a new file: {options.output!r} exists. Choose another name or pass --overwrite."
        )
    return check_writable(options.output)


# Environment variables that begin with these words affect kernels, threads or memory.
_CHOOSE = ("MOLA_KERNEL", "MOLA_ONEDNN", "OMP_", "MALLOC_")


def _record(options: BenchmarkOptions, arguments: Sequence[str], device: str) -> dict[str, Any]:
    """A record of everything that the numbers depend on, without results so far."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_description() | {"cores": os.cpu_count(), "system": platform.platform()},
        "load_average_before": load and list(load),
        "threads": options.threads,
        "device": device,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_CHOOSE)},
        "versions": software_versions(),
        "options": dict(vars(options)),
        "suite_seconds": {},
        "results": {},
    }


def _commit() -> str | None:
    """Commit of the project, marked when files differ from it; None outside a repository."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

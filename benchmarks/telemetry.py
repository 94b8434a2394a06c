"""The suite `telemetry`: how much slower a training step is when the use of experts is recorded.

Two models with the same weights take turns. The experts of one are recorded, and every token counts, as in
`mola train`. An interval of ten steps, the default between two log lines, ends by copying the sums to the host and
making the records of a line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import cases
from benchmarks.measure import ratio, rows_by_name, time_interleaved
from benchmarks.models import load_base, training_batch
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import build, make_step
from mola.insight.recorder import RouterRecorder
from mola.insight.usage import usage_of_sums

logger = logging.getLogger(__name__)

STEPS_OF_A_LINE = 10


def telemetry(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of a step that is recorded, and its ratio to one that is not; the same for the line of an interval."""
    for case in cases(options, model, folder):
        logger.info("telemetry: %s, %s, dropout %g", model, case.dtype, case.dropout)
        base = load_base(case)
        batch = training_batch(case, base.config.vocab_size)
        mola, recorded = build("mola", base, case), build("mola", base, case)
        recorder = RouterRecorder(recorded.model)
        actions: dict[str, Callable[[], Any]] = {
            "off": make_step(mola.model, batch, case),
            "on": make_step(recorded.model, batch, case),
            "line": lambda recorder=recorder: _line(recorder),
        }
        times = time_interleaved(actions, options.repeats, options.warmup, case.device)
        recorder.close()
        seconds = rows_by_name(times)
        own = ratio(times["on"], times["off"])
        line = seconds["line_seconds"]["median"] / STEPS_OF_A_LINE / seconds["off_seconds"]["median"]
        share = {"cost_percent": 100 * (own["median"] - 1 + line)}
        yield case.row() | mola.row() | {"routers": len(recorder.routers)} | seconds | {"on_over_off": own} | share


def _line(recorder: RouterRecorder) -> list[dict[str, Any]]:
    sums = recorder.sums()
    recorder.reset()
    return [asdict(usage) for usage in usage_of_sums(recorder.routers, sums)]

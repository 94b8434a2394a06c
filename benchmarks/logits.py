"""The suite `logits`: a training step on questions and answers, with the logits of all positions and of needed ones.

The batches are those of `mola train`: padded on the right, answers trained and nothing else. Two models with the same
weights take turns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import cases
from benchmarks.measure import ratio, rows_by_name, time_interleaved
from benchmarks.models import load_base
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import build, make_step
from benchmarks.text import has_text, question_batch
from mola.training.needed_logits import needed_logits

logger = logging.getLogger(__name__)


def logits(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of a step with either, and their ratio."""
    if not has_text("logits", model):
        return
    for case in cases(options, model, folder):
        logger.info("logits: %s, %s, dropout %g", model, case.dtype, case.dropout)
        base = load_base(case)
        batch = question_batch(case)
        kept = needed_logits(batch["labels"])
        batches = {"all": batch, "needed": batch | kept}
        actions: dict[str, Callable[[], Any]] = {
            name: make_step(build("mola", base, case).model, each, case) for name, each in batches.items()
        }
        times = time_interleaved(actions, options.repeats, options.warmup, case.device)
        seconds = rows_by_name(times)
        length = batch["input_ids"].shape[1]
        positions = {"positions": length, "needed_positions": len(kept["logits_to_keep"])}
        yield case.row() | positions | seconds | {"needed_over_all": ratio(times["needed"], times["all"])}

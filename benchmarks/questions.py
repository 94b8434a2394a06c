"""The suites `logits` and `attention`: a training step on questions and answers, computed in two ways.

The batches are those of `mola train`: padded on the right, with labels on the answers alone. Two models with the same
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
from mola.errors import MolaError
from mola.training.needed_logits import needed_logits

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("sdpa", "eager")

Row = dict[str, Any]
Actions = dict[str, Callable[[], Any]]


def logits(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[Row]:
    """Seconds of a step with the logits of all positions, and with only those needed, and the ratio."""
    if not has_text("logits", model):
        return
    for case in cases(options, model, folder):
        logger.info("logits: %s, %s, dropout %g", model, case.dtype, case.dropout)
        base = load_base(case)
        batch = question_batch(case)
        kept = needed_logits(batch["labels"])
        actions: Actions = {
            "all": make_step(build("mola", base, case).model, batch, case),
            "needed": make_step(build("mola", base, case).model, batch | kept, case),
        }
        times = time_interleaved(actions, options.repeats, options.warmup, case.device)
        positions = {"positions": batch["input_ids"].shape[1], "needed_positions": len(kept["logits_to_keep"])}
        yield case.row() | positions | rows_by_name(times) | {"needed_over_all": ratio(times["needed"], times["all"])}


def attention(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[Row]:
    """Seconds of a step with `sdpa`, the default of most models, and with `eager`, and the ratio of the two."""
    if not has_text("attention", model):
        return
    for case in cases(options, model, folder):
        logger.info("attention: %s, %s, dropout %g", model, case.dtype, case.dropout)
        base, batch = load_base(case), question_batch(case)
        batch |= needed_logits(batch["labels"])
        actions: Actions = {}
        for name in IMPLEMENTATIONS:
            provider = build("mola", base, case)
            transformer = provider.model.base_model.model
            transformer.set_attn_implementation(name)
            if transformer.config._attn_implementation != name:
                raise MolaError(f"`suite` attention compares sdpa with eager, and {model} cannot compute with {name}.")
            actions[name] = make_step(provider.model, batch, case)
        times = time_interleaved(actions, options.repeats, options.warmup, case.device)
        positions = {"positions": batch["input_ids"].shape[1]}
        yield case.row() | positions | rows_by_name(times) | {"eager_over_sdpa": ratio(times["eager"], times["sdpa"])}

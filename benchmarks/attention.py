"""The suite `attention`: a training step on questions and answers with `sdpa`, the default here, and with `eager`.

The batches are those of `mola train`, padded on the right. Two models with the same weights take turns.
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


def attention(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of a step with either, and their ratio."""
    if not has_text("attention", model):
        return
    for case in cases(options, model, folder):
        logger.info("attention: %s, %s, dropout %g", model, case.dtype, case.dropout)
        base, batch = load_base(case), question_batch(case)
        batch |= needed_logits(batch["labels"])
        actions: dict[str, Callable[[], Any]] = {}
        for name in IMPLEMENTATIONS:
            provider = build("mola", base, case)  # a model of its own
            base_of_it = provider.model.base_model.model
            base_of_it.set_attn_implementation(name)
            if base_of_it.config._attn_implementation != name:  # of a model that knows one way only this says nothing
                both = " and ".join(IMPLEMENTATIONS)
                raise MolaError(f"`suite` attention compares {both}, and {model} cannot compute with {name}.")
            actions[name] = make_step(provider.model, batch, case)
        times = time_interleaved(actions, options.repeats, options.warmup, case.device)
        positions = {"positions": batch["input_ids"].shape[1]}
        yield case.row() | positions | rows_by_name(times) | {"eager_over_sdpa": ratio(times["eager"], times["sdpa"])}

"""The suite `growth`: how a step's time grows with the experts of a module, and with the tokens of a step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import make_case
from benchmarks.measure import Times, ratios, time_interleaved
from benchmarks.models import Case, growth_base, training_batch
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import TAKES_PART, build, make_step

logger = logging.getLogger(__name__)

EXPERTS_WHILE_TOKENS_GROW = 8


def growth(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Steps of a few random layers with the model's shapes; see `growth_base`."""
    for dtype in options.dtype:
        case = make_case(options, model, folder, dtype, options.dropout[0])
        for experts in options.growth_experts:
            yield from _measure(options, replace(case, num_experts=experts), "experts")
        for tokens in options.growth_tokens:
            batch_size = tokens // case.seq_len
            grown = replace(case, num_experts=EXPERTS_WHILE_TOKENS_GROW, batch_size=batch_size)
            yield from _measure(options, grown, "tokens")


def _measure(options: BenchmarkOptions, case: Case, over: str) -> list[dict[str, Any]]:
    tokens = case.batch_size * case.seq_len
    logger.info("growth over %s: %s, %s experts, %s tokens", over, case.dtype, case.num_experts, tokens)
    case = replace(case, top_k=min(case.top_k, case.num_experts))
    # A list, because a text of one digit would be read as a pattern.
    listed = replace(case, num_experts=[case.num_experts] * options.growth_layers)
    base = growth_base(listed, options.growth_layers)
    batch = training_batch(listed, base.config.vocab_size)
    providers = [build(name, base, listed) for name in options.providers if name in TAKES_PART["growth"]]
    actions = {each.name: make_step(each.model, batch, listed) for each in providers}
    times = time_interleaved(actions, options.repeats, options.warmup, case.device)
    shared = {"over": over, "tokens": tokens, "num_layers": options.growth_layers}
    return [
        case.row()
        | shared
        | each.row()
        | times[each.name].row()
        | ratios(times, each.name)
        | _overhead(times, each.name)
        for each in providers
    ]


def _overhead(times: dict[str, Times], name: str) -> dict[str, float | None]:
    """Median time added to the frozen base, over the time that LoRA adds; None if LoRA added no measurable time."""
    if not {"frozen", "lora_8"} <= set(times):
        return {}
    frozen, lora, own = (times[each].row()["seconds"]["median"] for each in ("frozen", "lora_8", name))
    return {"overhead_in_lora_8": (own - frozen) / (lora - frozen) if lora > frozen else None}

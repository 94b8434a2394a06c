"""The suites about training steps: `step` (time), `memory` and `counts`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import cases
from benchmarks.counting import count_operators, saved_bytes
from benchmarks.measure import ratios, time_interleaved
from benchmarks.models import Case, load_base, training_batch
from benchmarks.options import BenchmarkOptions
from benchmarks.peak import measure_in_fresh_process
from benchmarks.providers import Provider, build, make_forward, make_step, trainable_parameters

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def step(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of a training step, and ratios to the frozen base and to LoRA."""
    for case in cases(options, model, folder):
        logger.info("step: %s, %s, dropout %g", model, case.dtype, case.dropout)
        providers, batch = _build_all(options.providers, case)
        actions = {each.name: make_step(each.model, batch, case) for each in providers}
        times = time_interleaved(actions, options.repeats, options.warmup, case.device)
        tokens = case.batch_size * case.seq_len
        for each in providers:
            measured = times[each.name].row()
            speed = tokens / measured["seconds"]["median"]
            yield case.row() | each.row() | measured | {"tokens_per_second": speed} | ratios(times, each.name)


def memory(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Peak memory of steps, and bytes kept for the backward pass above those of the frozen base."""
    for case in cases(options, model, folder):
        logger.info("memory: %s, %s, dropout %g", model, case.dtype, case.dropout)
        providers, batch = _build_all(_with_floor(options.providers), case)
        saved = {each.name: saved_bytes(each.model, make_forward(each.model, batch, case)) for each in providers}
        own = [each.row() for each in providers]
        del providers  # before other processes need the memory
        rows: Rows = []
        for row in own:
            name = row["provider"]
            if name in options.providers:
                peak = measure_in_fresh_process(name, case, options.threads)
                rows.append(case.row() | row | peak | saved[name] | _per_linear(saved, row, case))
        yield from (row | _above_frozen(row, rows) for row in rows)


def _per_linear(saved: dict[str, dict[str, int]], row: dict[str, Any], case: Case) -> dict[str, float]:
    """Bytes per token and adapted linear above the frozen base."""
    share = case.batch_size * case.seq_len * row["adapted_linears"]
    return {
        f"{kind}_per_token_and_linear": (saved[row["provider"]][kind] - saved["frozen"][kind]) / share
        for kind in ("saved_bytes", "saved_bytes_repeated")
    }


def _above_frozen(row: dict[str, Any], rows: Rows) -> dict[str, int]:
    """Peak bytes of a row above those of the frozen base in `rows`, which belong to the same case; empty without it."""
    for other in rows:
        if other["provider"] == "frozen":
            return {"peak_bytes_above_frozen": row["peak_bytes"] - other["peak_bytes"]}
    return {}


def counts(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Operators and host syncs of a step, per adapted linear above those of the frozen base."""
    for case in cases(options, model, folder):
        logger.info("counts: %s, %s, dropout %g", model, case.dtype, case.dropout)
        providers, batch = _build_all(_with_floor(options.providers), case)
        counted = {each.name: _count(each, batch, case) for each in providers}
        for each in providers:
            if each.name in options.providers:
                own = counted[each.name]
                per_linear = {
                    f"{kind}_per_linear": (own[kind] - counted["frozen"][kind]) / each.num_linears
                    for kind in ("forward_operators", "backward_operators", "host_syncs")
                }
                yield case.row() | each.row() | own | per_linear


def _count(provider: Provider, batch: dict[str, Any], case: Case) -> dict[str, Any]:
    forward = make_forward(provider.model, batch, case)
    forward().backward()  # work that happens only once, such as building caches, is not counted
    for parameter in trainable_parameters(provider.model):
        parameter.grad = None
    return count_operators(forward)


def _with_floor(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(["frozen", *names]))


def _build_all(names: Sequence[str], case: Case) -> tuple[list[Provider], dict[str, Any]]:
    base = load_base(case)
    return [build(name, base, case) for name in names], training_batch(case, base.config.vocab_size)

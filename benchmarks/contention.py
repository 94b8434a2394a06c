"""The suite `contention`: a step and a `generate` while other processes keep the cores busy.

OpenMP's threads wait for each other at the end of every operator. Those that wait actively spin, and when other
processes hold the cores, a thread that is waited for may not run for as long as a spinning one is scheduled. What
counts here is therefore the clock, which the other suites avoid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import PROMPT_TOKENS, make_case
from benchmarks.contended import ACTIONS, NEW_TOKENS, FreshProcess
from benchmarks.measure import summarize
from benchmarks.models import Case
from benchmarks.neighbours import busy_neighbours, usable_cores
from benchmarks.options import BenchmarkOptions

logger = logging.getLogger(__name__)

_QUIET = 0.2  # cores that other processes may use


class Setting(NamedTuple):
    """How a process computes.

    Attributes:
        threads: of torch.
        wait_policy: `OMP_WAIT_POLICY`; None where the variable is not set.
    """

    threads: int
    wait_policy: str | None


def settings(cores: int) -> list[Setting]:
    """One thread, and a thread for every core with each way to wait."""
    return [Setting(1, None), *(Setting(cores, policy) for policy in ("ACTIVE", "PASSIVE", None))]


def contention(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of mola on the CPU in the first dtype and dropout, on quiet cores and with a neighbour for every core."""
    case = replace(make_case(options, model, folder, options.dtype[0], options.dropout[0]), device="cpu")
    for action in ACTIONS:
        for setting in settings(usable_cores()):
            waiting = setting.wait_policy or "not set"
            logger.info("contention: %s, %s, %d threads, OMP_WAIT_POLICY %s", model, action, setting.threads, waiting)
            yield measure(options, case, action, setting, usable_cores())


def measure(options: BenchmarkOptions, case: Case, action: str, setting: Setting, neighbours: int) -> dict[str, Any]:
    """One row: an action on quiet cores, then beside busy neighbours, in the same process.

    Returns:
        What was compared; `quiet_` and `busy_` summaries of what `FreshProcess.run` gives, or `seconds_at_least` where
        a run was ended by the limit; `busy_over_quiet`, the ratio of the medians on the clock, or
        `busy_over_quiet_at_least`. Nothing is measured beside neighbours after a run that was ended without them.
    """
    with FreshProcess(action, case, setting.threads, setting.wait_policy) as process:
        found = {"threads": process.found["threads"], "waiting": process.found["wait_policy"] or "not set"}
        quiet = _repeat(process, options)
        _warn_if_not_quiet(quiet)
        with busy_neighbours(neighbours):
            busy = _repeat(process, options) if process.alive else {}
    used = case if action == "step" else replace(case, batch_size=1, seq_len=PROMPT_TOKENS + NEW_TOKENS)
    measured = {f"{when}_{key}": each[key] for when, each in (("quiet", quiet), ("busy", busy)) for key in each}
    return used.row() | {"action": action, "neighbours": neighbours} | found | measured | _ratio(quiet, busy)


def _repeat(process: FreshProcess, options: BenchmarkOptions) -> dict[str, Any]:
    """Summaries of `repeats` runs; of fewer where these take longer than the limit in all."""
    runs: list[dict[str, float]] = []
    limit = options.contention_limit
    for index in range(-options.warmup, options.repeats):
        seconds = process.run(limit)
        if seconds is None:
            return {"seconds_at_least": limit}
        if index >= 0:
            runs.append(seconds)
        if sum(run["wall_seconds"] for run in runs) > limit:
            break
    return {name: summarize([run[name] for run in runs]) for name in runs[0]}


def _warn_if_not_quiet(quiet: dict[str, Any]) -> None:
    others = quiet["cores_of_others"]["median"] if "cores_of_others" in quiet else 0.0
    if others > _QUIET:
        logger.warning("The machine was not quiet: other processes kept %.1f cores busy. Measure again later.", others)


def _ratio(quiet: dict[str, Any], busy: dict[str, Any]) -> dict[str, float]:
    if "wall_seconds" not in quiet:
        return {}
    alone = quiet["wall_seconds"]["median"]
    if "wall_seconds" in busy:
        return {"busy_over_quiet": busy["wall_seconds"]["median"] / alone}
    return {"busy_over_quiet_at_least": busy["seconds_at_least"] / alone}

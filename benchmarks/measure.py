"""Timing that is reliable on a shared machine: providers take turns, and processor time is counted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Times:
    """Seconds of one provider, one entry per measured round.

    Attributes:
        cpu_seconds: processor time of this process, all threads together.
        wall_seconds: time on the clock.
        device_seconds: time between two events on the GPU; empty without a GPU.
    """

    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """The seconds that ratios are computed from: the GPU's, or without a GPU the processor's."""
        return self.device_seconds or self.cpu_seconds

    def row(self) -> dict[str, Any]:
        """Summaries of every clock; `seconds` is the one that ratios are computed from."""
        clocks = ("seconds", "cpu_seconds", "wall_seconds", "device_seconds")
        return {name: summarize(values) for name in clocks if (values := getattr(self, name))}


def rows_by_name(times: Mapping[str, Times]) -> dict[str, Any]:
    """The summaries of several actions in one row; each key begins with the name of its action."""
    return {f"{name}_{key}": value for name, each in times.items() for key, value in each.row().items()}


def summarize(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and the samples themselves."""
    low, median, high = (float(value) for value in np.percentile(samples, (20, 50, 80)))
    return {"median": median, "p20": low, "p80": high, "samples": list(samples)}


def ratio(times: Times, reference: Times) -> dict[str, Any]:
    """Summary of the ratios within each round, because both ran under the same conditions within a round."""
    return summarize([a / b for a, b in zip(times.seconds, reference.seconds, strict=True)])


def ratios(all_times: Mapping[str, Times], name: str) -> dict[str, Any]:
    """Ratios of one provider to `frozen` (or `base`) and `lora_8`, if these took part."""
    return {
        f"ratio_to_{reference}": ratio(all_times[name], all_times[reference])
        for reference in ("frozen", "base", "lora_8")
        if reference in all_times
    }


def time_interleaved(
    actions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int, device: str
) -> dict[str, Times]:
    """Run every action once per round, each round beginning with a different action.

    Args:
        actions: name -> what to time.
        repeats: measured rounds.
        warmup: rounds before them that do not count.
        device: the device on which the actions compute.

    Returns:
        Name -> times, one for each measured round.
    """
    names = list(actions)
    times = {name: Times() for name in names}
    gc.collect()
    gc.freeze()  # the garbage collector need not look through the objects that exist now before every run
    try:
        for round_index in range(-warmup, repeats):
            first = round_index % len(names)
            for name in names[first:] + names[:first]:
                target = times[name] if round_index >= 0 else Times()
                _time_once(actions[name], target, device)
    finally:
        gc.unfreeze()
    return times


def _time_once(action: Callable[[], Any], times: Times, device: str) -> None:
    on_gpu = torch.device(device).type == "cuda"
    gc.collect()
    gc.disable()
    try:
        if on_gpu:
            torch.cuda.synchronize(device)
            stream = torch.cuda.current_stream(torch.device(device))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
        cpu, wall = time.process_time(), time.perf_counter()
        action()
        if on_gpu:
            end.record(stream)
            torch.cuda.synchronize(device)
        times.wall_seconds.append(time.perf_counter() - wall)
        times.cpu_seconds.append(time.process_time() - cpu)
        if on_gpu:
            times.device_seconds.append(start.elapsed_time(end) / 1000)
    finally:
        gc.enable()

"""The suite `redundancy`: distances between experts, computed from their factors and from their whole updates.

The experts are random, in the shapes of LLaMA-2-7B; no model is read. The direct way needs as little memory as
possible: it forms two updates at a time and subtracts the second in place. Bytes are the most that the CPU allocator
had given out at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import BenchmarkOptions
from mola.insight.redundancy import expert_distances

SHAPES = ((4096, 4096), (4096, 11008))  # features in and out of the attention's and the MLP's linears
EXPERTS, RANK = 8, 8


def redundancy(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each shape: peak bytes and CPU seconds of both ways, and how far their results differ."""
    for width_in, width_out in SHAPES:
        experts_A, experts_B = random_experts(width_in, width_out, options.seed)
        row: dict[str, Any] = {"features_in": width_in, "features_out": width_out, "num_experts": EXPERTS, "r": RANK}
        found = {}
        for name, ways in (("factors", expert_distances), ("direct", direct_distances)):
            start = time.process_time()
            found[name] = ways(experts_A, experts_B)
            row[f"{name}_cpu_seconds"] = time.process_time() - start
            row[f"{name}_peak_bytes"] = peak_allocated(ways, experts_A, experts_B)
        others = ~torch.eye(EXPERTS, dtype=torch.bool)
        row["largest_relative_difference"] = (found["factors"] / found["direct"] - 1)[others].abs().max().item()
        yield row | {"direct_over_factors": row["direct_peak_bytes"] / row["factors_peak_bytes"]}


def random_experts(width_in: int, width_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A `(E, r, in)` and B `(E, r, out)` of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (EXPERTS, RANK, width_in), (EXPERTS, RANK, width_out)
    experts_A, experts_B = (torch.randn(shape, generator=generator) for shape in shapes)
    return experts_A, experts_B


def direct_distances(experts_A: torch.Tensor, experts_B: torch.Tensor) -> torch.Tensor:
    """Frobenius norms of the differences of all pairs of updates `B A`: float64 `(E, E)`."""
    distances = torch.zeros(len(experts_A), len(experts_A), dtype=torch.float64)
    for first, second in combinations(range(len(experts_A)), 2):
        difference = experts_B[first].t() @ experts_A[first]
        difference -= experts_B[second].t() @ experts_A[second]
        rows = torch.linalg.vector_norm(difference, dim=1)  # a float32 norm over the whole matrix would be inaccurate
        distances[first, second] = distances[second, first] = torch.linalg.vector_norm(rows.double())
    return distances


def peak_allocated(action: Callable[..., Any], *arguments: Any) -> int:
    """Most bytes on the CPU that tensors made by `action` held at once."""
    # Without acc_events PyTorch 2.10 would warn that the events of earlier cycles are lost; there is only one cycle.
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        action(*arguments)
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

"""Peak memory of training steps, each provider in a process of its own: `python -m benchmarks.peak < JOB.json`."""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import prepare_torch
from benchmarks.models import PROJECT, Case, load_base, training_batch
from benchmarks.providers import build, make_step, trainable_parameters

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
STEPS = 2  # measured steps, after a first step that fills the libraries' caches


def measure_in_fresh_process(name: str, case: Case, threads: int) -> dict[str, Any]:
    """Peak memory of a provider's steps above what it holds when loaded; gradients and AdamW's state count.

    Returns:
        `peak_bytes`, `loaded_bytes`, and `method`, which says how these were read.

    Raises:
        RuntimeError: the process failed; its error output is in the message.
    """
    job = json.dumps({"provider": name, "case": asdict(case), "threads": threads})
    command = [sys.executable, "-m", "benchmarks.peak"]
    done = subprocess.run(command, input=job, capture_output=True, text=True, cwd=PROJECT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Measuring the memory of {name!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, case: Case) -> dict[str, Any]:
    """Like `measure_in_fresh_process`, but in this process, which must not have computed anything before."""
    base = load_base(case)
    provider = build(name, base, case)
    batch = training_batch(case, base.config.vocab_size)
    step = make_step(provider.model, batch, case)
    for parameter in provider.model.parameters():
        parameter.sum()  # weights that are mapped from their file come into memory when they are first read
    make_step(provider.model, batch, replace(case, optimizer=False))()
    for parameter in trainable_parameters(provider.model):
        parameter.grad = None
    gc.collect()
    if torch.device(case.device).type == "cuda":
        return _on_gpu(step, case.device)
    return _on_cpu(step)


def _on_gpu(step: Any, device: str) -> dict[str, Any]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    loaded = torch.cuda.memory_allocated(device)
    _run(step)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - loaded
    return {"peak_bytes": peak, "loaded_bytes": loaded, "method": "torch.cuda.max_memory_allocated"}


def _on_cpu(step: Any) -> dict[str, Any]:
    if _STATUS.exists() and _give_back_freed_memory() and _reset_peak():
        loaded = _status_bytes("VmRSS")
        _run(step)
        peak = _status_bytes("VmHWM") - loaded
        return {"peak_bytes": peak, "loaded_bytes": loaded, "method": "VmHWM, reset after a first step"}
    loaded = _max_rss()
    _run(step)
    return {
        "peak_bytes": _max_rss() - loaded,
        "loaded_bytes": loaded,
        "method": "ru_maxrss, above that of a first step",
    }


def _run(step: Any) -> None:
    for _ in range(STEPS):
        step()


def _give_back_freed_memory() -> bool:
    """Let the allocator return freed memory to the system; unreturned memory would hide the steps' need."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False  # not glibc
    return True


def _reset_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _max_rss() -> int:
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


def main() -> int:
    """Measure the job on standard input."""
    job = json.load(sys.stdin)
    case = Case(**job["case"])
    prepare_torch(case.device, job["threads"])
    print(json.dumps(measure(job["provider"], case)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

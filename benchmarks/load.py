"""The suite `load`: seconds to load a base model with its adapter, and the adapter's size on disk."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.cases import make_case
from benchmarks.measure import ratios, time_interleaved
from benchmarks.models import Case, load_base
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import TAKES_PART, build
from mola.models.loading import load_model

logger = logging.getLogger(__name__)


def load(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds to load LoRA and mola by PEFT and by `mola.load_model`, with the files in the system's cache."""
    for dtype in options.dtype:
        logger.info("load: %s, %s", model, dtype)
        case = make_case(options, model, folder, dtype, 0.0)
        with tempfile.TemporaryDirectory(prefix="mola-benchmarks-") as temporary:
            sizes = _save(options, case, Path(temporary))
            yield from _measure(options, case, sizes, Path(temporary))


def _save(options: BenchmarkOptions, case: Case, parent: Path) -> dict[str, dict[str, Any]]:
    """Write adapters as training does, in float32; return what the rows say about each adapter."""
    base = load_base(case)
    sizes = {}
    for name in TAKES_PART["load"]:
        if name in options.providers and name != "frozen":
            provider = build(name, base, case)
            provider.model.save_pretrained(parent / name)
            files = {file.name: file.stat().st_size for file in (parent / name).iterdir()}
            weights = files["adapter_model.safetensors"]
            size = {"adapter_bytes": weights, "folder_bytes": sum(files.values())}
            sizes[name] = provider.row() | size
    return sizes


def _measure(
    options: BenchmarkOptions, case: Case, sizes: dict[str, dict[str, Any]], parent: Path
) -> list[dict[str, Any]]:
    actions = {"base": functools.partial(_with_peft, case, None)}
    for name in sizes:
        actions[name] = functools.partial(_with_peft, case, parent / name)
        actions[f"{name} by mola.load_model"] = functools.partial(_with_mola, case, parent / name)
    times = time_interleaved(actions, options.repeats, options.warmup, case.device)
    return [
        case.row() | sizes.get(_adapter(name), {}) | {"provider": name} | measured.row() | ratios(times, name)
        for name, measured in times.items()
    ]


def _adapter(action: str) -> str:
    return action.partition(" ")[0]


def _with_peft(case: Case, adapter: Path | None) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(case.folder, dtype=getattr(torch, case.dtype)).to(case.device)
    if adapter is not None:
        PeftModel.from_pretrained(model, str(adapter)).eval()


def _with_mola(case: Case, adapter: Path) -> None:
    load_model(case.folder, adapter, dtype=case.dtype, device=case.device)

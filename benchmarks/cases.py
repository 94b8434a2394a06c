"""Makes cases from options, and checks them against the model's configuration before its weights are loaded."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.models import Case
from benchmarks.options import BenchmarkOptions
from mola.errors import MolaError
from mola.models.base_model import load_config, max_positions
from mola.models.devices import resolve_device
from mola.models.plan import PlanOptions, plan

COMPILERS = (os.environ.get("CXX", "g++"), "clang++")
PROMPT_TOKENS, NEW_TOKENS = 16, 32


def choose_device(name: str) -> str:
    """Name of the device to measure on; a GPU has its number in the name.

    Raises:
        MolaError: the device does not exist, or the benchmarks cannot measure on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = resolve_device(name)
    if device.type not in ("cpu", "cuda"):
        raise MolaError(f"`device` must be cpu or cuda, because only these are measured: got {name!r}.")
    if device.type == "cuda":
        return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"
    return "cpu"


def check_compiler(options: BenchmarkOptions) -> None:
    """Raise a `MolaError` if `torch.compile` is to be measured and there is no compiler for its code."""
    compiles = "decode" in options.suite and "compiled" in options.decode_modes
    if compiles and not any(map(shutil.which, COMPILERS)):
        raise MolaError(
            f"`decode_modes` compiled needs a C++ compiler, one of {', '.join(COMPILERS)}: there is none. "
            "Install one, or pass --decode_modes eager."
        )


def prepare_torch(device: str, threads: int) -> None:
    """Set the number of threads and the current GPU of this process."""
    torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(device)


def make_case(options: BenchmarkOptions, model: str, folder: Path, dtype: str, dropout: float) -> Case:
    """The case for one dtype and dropout."""
    return Case(
        model=model,
        folder=str(folder),
        dtype=dtype,
        device=choose_device(options.device),
        dropout=dropout,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        num_experts=options.num_experts,
        r=options.r,
        top_k=options.top_k,
        optimizer=options.optimizer,
        seed=options.seed,
    )


def cases(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[Case]:
    """All combinations of dtype and dropout."""
    for dtype, dropout in itertools.product(options.dtype, options.dropout):
        yield make_case(options, model, folder, dtype, dropout)


def check_model(options: BenchmarkOptions, folder: Path) -> None:
    """Check that the options fit a model.

    Raises:
        MolaError: the model has too few positions, or its layers cannot have this allocation of experts.
    """
    needed = {"seq_len": options.seq_len}
    if "decode" in options.suite:
        needed["prompt and new tokens"] = PROMPT_TOKENS + NEW_TOKENS
    limit = max_positions(load_config(folder))
    for name, tokens in needed.items():
        if limit is not None and tokens > limit:
            raise MolaError(f"`{name}` must fit the model: got {tokens}, {folder.name} has {limit} positions.")
    plan(
        PlanOptions(base_model=str(folder), num_experts=options.num_experts, r=str(options.r), top_k=str(options.top_k))
    )

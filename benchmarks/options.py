"""Options of `python -m benchmarks`, checked before anything is loaded."""

# ruff: noqa: RUF009 - `_several` gives every object a list of its own

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.providers import PROVIDERS, TAKES_PART
from mola.errors import MolaError
from mola.options.fields import option

SUITES = (
    "step",
    "memory",
    "counts",
    "decode",
    "growth",
    "curve",
    "telemetry",
    "logits",
    "attention",
    "redundancy",
)
DTYPES = ("float32", "bfloat16")
DECODE_MODES = ("eager", "compiled")


def _several(default: Sequence[Any], help: str) -> Any:
    """Like `mola.options.fields.option`, for an option with several values."""
    return field(default_factory=lambda: list(default), metadata={"help": help})


@dataclass
class BenchmarkOptions:
    """Options of `python -m benchmarks`.

    Raises:
        MolaError: a value is outside its range, or a name is unknown.
    """

    suite: list[str] = _several(["all"], f"What to measure: all, or some of {', '.join(SUITES)}.")
    model: list[str] = _several(
        ["smollm2", "random12"],
        "smollm2, random12 (random weights, 12 layers), or folders of causal language models.",
    )
    dtype: list[str] = _several(DTYPES, "Dtypes of the frozen base. Adapters train in float32.")
    dropout: list[float] = _several([0.0, 0.05], "Dropout on the adapters' input. growth uses the first, curve uses 0.")
    providers: list[str] = _several(
        PROVIDERS,
        "Who is measured. decode and growth leave out lora_equal; decode leaves out the loop. telemetry, logits, "
        "attention and redundancy measure mola alone; curve compares the loop with mola.",
    )
    batch_size: int = option(4, "Samples of a step.")
    seq_len: int = option(128, "Tokens of a sample.")
    num_experts: str = option(
        "2468",
        "Experts of mola and the loop, in any notation of MolaConfig; redundancy has 8 of rank 8.",
    )
    r: int = option(8, "Rank of each expert.")
    top_k: int = option(2, "Experts used per token.")
    repeats: int = option(5, "Measured rounds; every round runs each provider once.")
    warmup: int = option(1, "Rounds before the measured ones, which do not count.")
    optimizer: bool = option(False, "Make AdamW part of the step.")
    device: str = option("auto", "cpu, cuda or cuda:N; auto chooses CUDA if there is a GPU.")
    threads: int = option(1, "Threads of torch on the CPU.")
    keep_memory: bool = option(False, "Keep freed memory in the process, as the `mola` command does; Linux only.")
    decode_batch_sizes: list[int] = _several([1, 8], "Sequences that are generated at once.")
    decode_modes: list[str] = _several(DECODE_MODES, "Without and with torch.compile.")
    growth_experts: list[int] = _several([1, 2, 4, 8, 16, 32, 64], "Experts per module in growth.")
    growth_tokens: list[int] = _several([128, 256, 512, 1024, 2048], "Tokens of a step in growth.")
    growth_layers: int = option(2, "Decoder layers of the growth model, which has the shapes of `model`.")
    curve_steps: int = option(100, "Optimiser steps of curve.")
    curve_seq_len: int = option(64, "Tokens of a block of text in curve.")
    seed: int = option(0, "Random seed of weights and tokens.")
    output: str | None = option(None, "JSON file to write; default: results/benchmarks-DATE-TIME.json.")
    overwrite: bool = option(False, "Replace `output` if it exists.")

    def __post_init__(self) -> None:
        if "all" in self.suite:
            self.suite = list(SUITES)
        for name, known in (
            ("suite", SUITES),
            ("dtype", DTYPES),
            ("providers", PROVIDERS),
            ("decode_modes", DECODE_MODES),
        ):
            _check_names(name, getattr(self, name), known)
        for name in ("batch_size", "seq_len", "r", "top_k", "repeats", "threads", "growth_layers", "curve_steps"):
            _check_at_least_one(name, getattr(self, name))
        for name in ("decode_batch_sizes", "growth_experts", "growth_tokens"):
            for value in getattr(self, name):
                _check_at_least_one(name, value)
        if self.warmup < 0:
            raise MolaError(f"`warmup` must be at least 0: got {self.warmup}. Pass 1 or more.")
        self._check_rest()

    def _check_rest(self) -> None:
        for value in self.dropout:
            if not 0 <= value < 1:
                raise MolaError(f"`dropout` must be at least 0 and below 1: got {value}. Pass for example 0 0.05.")
        for name in ("seq_len", "curve_seq_len"):
            if (length := getattr(self, name)) < 2:
                raise MolaError(f"`{name}` must be at least 2, because one token predicts the next: got {length}.")
        for suite in self.suite:
            known = TAKES_PART.get(suite, PROVIDERS)
            if not set(known) & set(self.providers):
                raise MolaError(
                    f"`providers` must hold one of {', '.join(known)} for the suite {suite}: got "
                    f"{' '.join(self.providers)}. Add one, or leave {suite} out of `suite`."
                )
        uneven = [tokens for tokens in self.growth_tokens if tokens % self.seq_len]
        if uneven and "growth" in self.suite:
            raise MolaError(
                f"`growth_tokens` must be multiples of `seq_len`: got {uneven[0]} and {self.seq_len}. "
                "Change one of the two."
            )


def _check_names(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise MolaError(f"`{name}` must be some of {', '.join(known)}: got {value!r}.")
    if len(set(values)) != len(values):
        raise MolaError(f"`{name}` names something twice: got {' '.join(values)}. Name it once.")


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise MolaError(f"`{name}` must be at least 1: got {value}.")

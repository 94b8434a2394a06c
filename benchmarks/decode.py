"""The suite `decode`: tokens per second of greedy generation, without and with `torch.compile`."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from benchmarks.cases import NEW_TOKENS, PROMPT_TOKENS, make_case
from benchmarks.measure import ratios, time_interleaved
from benchmarks.models import Case, load_base
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import TAKES_PART, Provider, build

logger = logging.getLogger(__name__)


def decode(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds that `generate` needs, the prompt included, and the resulting tokens per second."""
    for dtype in options.dtype:
        case = make_case(options, model, folder, dtype, 0.0)
        base = load_base(case)
        for mode, batch_size in itertools.product(options.decode_modes, options.decode_batch_sizes):
            logger.info("decode: %s, %s, %s, batch %s", model, dtype, mode, batch_size)
            names = [name for name in TAKES_PART["decode"] if name in options.providers]
            providers = [build(name, base, case, inference=True) for name in names]
            yield from _measure(options, case, providers, mode, batch_size)


def _measure(
    options: BenchmarkOptions, case: Case, providers: list[Provider], mode: str, batch_size: int
) -> list[dict[str, Any]]:
    torch._dynamo.reset()  # graphs of a different batch size would make the new graphs dynamic
    vocabulary = providers[0].model.config.vocab_size
    generator = torch.Generator().manual_seed(case.seed)
    prompt = torch.randint(3, vocabulary, (batch_size, PROMPT_TOKENS), generator=generator).to(case.device)
    arguments = _arguments(mode, case.device)
    actions, graphs = {}, {}
    for each in providers:
        action = functools.partial(_generate, each.model, prompt, arguments)
        before = _graphs()
        action()
        graphs[each.name] = _graphs() - before
        actions[_name(each)] = action
    before = _graphs()
    times = time_interleaved(actions, options.repeats, options.warmup, case.device)
    recompiled = _graphs() - before
    rows = []
    for each in providers:
        name = _name(each)
        measured = times[name].row()
        rows.append(
            case.row()
            | each.row()
            | {"provider": name, "mode": mode, "batch_size": batch_size, "seq_len": PROMPT_TOKENS + NEW_TOKENS}
            | {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
            | {"graphs": graphs[each.name], "graphs_while_measured": recompiled}
            | measured
            | {"tokens_per_second": batch_size * NEW_TOKENS / measured["seconds"]["median"]}
            | {"tokens_per_wall_second": batch_size * NEW_TOKENS / measured["wall_seconds"]["median"]}
            | ratios(times, name)
        )
    return rows


def _name(provider: Provider) -> str:
    return (
        "base" if provider.name == "frozen" else provider.name
    )  # without gradients the frozen base is simply the base model


def _arguments(mode: str, device: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": NEW_TOKENS,
        "max_new_tokens": NEW_TOKENS,
        "pad_token_id": 0,
    }
    if mode == "eager":
        return arguments | {"disable_compile": True}
    # Transformers compiles the steps after the prompt; on a CPU only if all devices are allowed.
    on_gpu = torch.device(device).type == "cuda"
    config = CompileConfig(dynamic=False, mode="reduce-overhead" if on_gpu else "default")
    config._compile_all_devices = True
    return arguments | {"cache_implementation": "static", "compile_config": config}


def _generate(model: Any, prompt: torch.Tensor, arguments: dict[str, Any]) -> None:
    output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **arguments)
    if output.shape != (prompt.shape[0], PROMPT_TOKENS + NEW_TOKENS):
        raise RuntimeError(f"{NEW_TOKENS} new tokens were expected, but the result has shape {tuple(output.shape)}.")


def _graphs() -> int:
    """Number of graphs that `torch.compile` has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]

"""The suite `compile`: training steps with and without `torch.compile`, and the graphs that several lengths need."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.cases import make_case
from benchmarks.measure import Times, ratio, ratios, time_interleaved
from benchmarks.models import Case, load_base, training_batch
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import TAKES_PART, Provider, build, make_step

logger = logging.getLogger(__name__)

PASSES = 2  # over the batches of all lengths; in the second nothing is left to compile


class Graphs(NamedTuple):
    """What `torch.compile` made in this process so far, or between two moments."""

    graphs: int
    breaks: int

    @classmethod
    def now(cls) -> Graphs:
        counters = torch._dynamo.utils.counters
        return cls(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))

    def since(self, before: Graphs) -> Graphs:
        return Graphs(self.graphs - before.graphs, self.breaks - before.breaks)


class TokensIn(nn.Module):
    """A provider, or its compiled forward, behind the look-up of its embeddings.

    Their output asks for a gradient here as in every suite. The hook that does it elsewhere changes a tensor in
    place, which no graph can hold: every provider would be cut in pieces.
    """

    def __init__(self, provider: Any, forward_of: Callable[..., Any]) -> None:
        super().__init__()
        self.provider: Any = provider
        self._forward_of = [forward_of]  # in a list: a second name for the same parameters is no second module

    def forward(self, input_ids: torch.Tensor, **batch: Any) -> Any:
        embedded = self.provider.get_input_embeddings()(input_ids)
        return self._forward_of[0](inputs_embeds=embedded.requires_grad_(), **batch)


def compile_steps(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of a step, eager and compiled, and of the first compiled one; graphs for batches of several lengths."""
    for dtype in options.dtype:
        case = make_case(options, model, folder, dtype, options.dropout[0])
        base = load_base(case)
        names = [name for name in TAKES_PART["compile"] if name in options.providers]
        providers = [build(name, base, case) for name in names]
        for each in providers:
            each.model.disable_input_require_grads()
        yield from _measure(options, case, providers)


def _measure(options: BenchmarkOptions, case: Case, providers: list[Provider]) -> list[dict[str, Any]]:
    batch = training_batch(case, providers[0].model.config.vocab_size)
    torch._dynamo.reset()  # graphs of other shapes would make these dynamic
    eager, compiled, built = {}, {}, {}
    for each in providers:
        logger.info("compile: %s, %s, dropout %g: %s", case.model, case.dtype, case.dropout, each.name)
        eager[each.name], compiled[each.name] = (make_step(one, batch, case) for one in both(each.model, options, None))
        built[each.name] = _first_step(compiled[each.name])
    actions = {f"eager {name}": step for name, step in eager.items()}
    actions |= {f"compiled {name}": step for name, step in compiled.items()}
    before = Graphs.now()
    times = time_interleaved(actions, options.repeats, options.warmup, case.device)
    recompiled = Graphs.now().since(before).graphs
    compiled_times = {name: times[f"compiled {name}"] for name in compiled}
    return [
        case.row()
        | each.row()
        | {"backend": options.compile_backend}
        | _clocks("eager", times[f"eager {each.name}"])
        | _clocks("compiled", times[f"compiled {each.name}"])
        | {"compiled_over_eager": ratio(times[f"compiled {each.name}"], times[f"eager {each.name}"])}
        | ratios(compiled_times, each.name)
        | built[each.name]
        | {"graphs_while_measured": recompiled}
        | _over_lengths(options, case, each)
        for each in providers
    ]


def both(model: nn.Module, options: BenchmarkOptions, dynamic: bool | None) -> tuple[TokensIn, TokensIn]:
    """A provider as it is, and with its forward compiled: in a wrapper, the model itself stays eager."""
    compiled = torch.compile(model, backend=options.compile_backend, dynamic=dynamic)
    return TokensIn(model, model), TokensIn(model, compiled)


def _first_step(step: Callable[[], None]) -> dict[str, Any]:
    before, start = Graphs.now(), time.perf_counter()
    with _empty_cache():
        step()
    made = Graphs.now().since(before)
    return {"first_step_seconds": time.perf_counter() - start, "graphs": made.graphs, "graph_breaks": made.breaks}


def _empty_cache() -> AbstractContextManager[None]:
    """Without what earlier runs have compiled: seconds would depend on them."""
    from torch._inductor.utils import fresh_inductor_cache  # here, because it takes seconds

    return fresh_inductor_cache()


def _clocks(kind: str, times: Times) -> dict[str, Any]:
    return {f"{kind}_{clock}": summary for clock, summary in times.row().items()}


def _over_lengths(options: BenchmarkOptions, case: Case, provider: Provider) -> dict[str, Any]:
    """Graphs over padded batches of several lengths, and the time of a pass over them once they are compiled."""
    torch._dynamo.reset()
    case = replace(case, optimizer=False)  # every length would have one of its own
    logger.info("compile: %s: batches of %s tokens", provider.name, options.compile_lengths)
    vocabulary = provider.model.config.vocab_size
    batches = [padded_batch(case, vocabulary, length) for length in options.compile_lengths]
    models = both(provider.model, options, True if options.compile_dynamic else None)
    eager, compiled = ([make_step(one, batch, case) for batch in batches] for one in models)
    shuffled, graphs = random.Random(case.seed), []
    start, before = time.perf_counter(), Graphs.now()
    with _empty_cache():
        for _ in range(PASSES):
            for step in shuffled.sample(compiled, len(compiled)):
                step()
            graphs.append(Graphs.now().since(before))
    seconds = time.perf_counter() - start
    actions = {"eager": lambda: _run(eager), "compiled": lambda: _run(compiled)}
    times = time_interleaved(actions, options.repeats, options.warmup, case.device)
    return {
        "lengths": list(options.compile_lengths),
        "dynamic": options.compile_dynamic,
        "lengths_batches": PASSES * len(batches),
        "lengths_graphs": graphs[-1].graphs,
        "lengths_graphs_in_last_pass": graphs[-1].graphs - graphs[0].graphs,
        "lengths_graph_breaks": graphs[-1].breaks,
        "lengths_first_seconds": seconds,
        "lengths_compiled_over_eager": ratio(times["compiled"], times["eager"]),
    }


def _run(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()


def padded_batch(case: Case, vocabulary: int, length: int) -> dict[str, torch.Tensor]:
    """Random samples of different lengths, padded to a common one, as a training run makes them."""
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(3, vocabulary, (case.batch_size, length), generator=generator)
    kept = torch.randint(length // 2, length, (case.batch_size, 1), generator=generator) + 1
    kept[0] = length
    mask = (torch.arange(length) < kept).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: tensor.to(case.device) for name, tensor in batch.items()}

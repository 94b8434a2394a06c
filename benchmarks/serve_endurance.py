"""`python -m benchmarks.serve_endurance`: does `mola serve` stay as it was under mixed load?

Clients of seven kinds at once, each sending its next request when the last one has ended: streams and whole answers
that are compared with `mola.generate_text`, sampled ones with a seed, clients that leave after the first text,
prompts of hundreds of tokens, requests that are wrong, and one that loads, asks and unloads adapters. Memory of the
server is read every few seconds; the time of one answer is taken before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.errors import in_one_line
from benchmarks.serving import save_adapter, server
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.options.fields import option
from mola.options.parsing import parse

logger = logging.getLogger("benchmarks")

_PROJECT = Path(__file__).resolve().parents[1]
_TOKEN = "endurance"
_LOADED = "extra"
_PROMPTS = [f"A short story about the {each}:" for each in ("sun", "sea", "moon", "wind", "rain")]
_LONG = "It was a long day. " * 50
_KINDS = ("streamed", "whole", "sampled", "leaving", "long", "refused", "loading")  # methods of `_Run`
_WRONG: tuple[dict[str, Any], ...] = (
    {"temperature": -1},
    {"model": "nobody"},
    {"max_tokens": 10**6},
    {"logit_bias": {"5": 1}},
    {"prompt": ["a"] * 1000},
)


@dataclass
class EnduranceOptions:
    """Options of `python -m benchmarks.serve_endurance`."""

    base_model: str = option(
        str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Folder of the base model; by default the quickstart's."
    )
    minutes: float = option(30.0, "How long.")
    clients: int = option(2, "Clients of each kind but the one that loads adapters.")
    max_tokens: int = option(16, "Tokens of each answer.")
    kinds: list[str] = field(default_factory=lambda: list(_KINDS), metadata={"help": f"Some of: {', '.join(_KINDS)}."})
    every: float = option(5.0, "Seconds between two looks at the memory.")
    output: str | None = option(None, "Result file (JSON).")


@in_one_line("benchmarks.serve_endurance")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print what happened, write JSON if asked for.

    Returns:
        The exit code: 0, 1 if an answer was wrong or a request was lost, 2 for wrong input.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return run(parse(EnduranceOptions, arguments, prog="python -m benchmarks.serve_endurance", summary=__doc__ or ""))


def run(options: EnduranceOptions) -> int:
    """See `main`."""
    if not (Path(options.base_model) / "config.json").is_file():
        raise MolaError(f"`base_model` must be a folder that holds a model: got {options.base_model!r}.")
    if not (options.minutes > 0 and options.every > 0 and min(options.clients, options.max_tokens) >= 1):
        raise MolaError("`minutes` and `every` must be positive, `clients` and `max_tokens` at least 1.")
    if not options.kinds or set(options.kinds) - set(_KINDS):
        raise MolaError(f"`kinds` must be some of {', '.join(_KINDS)}: got {options.kinds}.")
    output = None if options.output is None else check_writable(options.output)
    with tempfile.TemporaryDirectory(prefix="mola-endurance-") as temporary:
        root = Path(temporary)
        for seed, name in enumerate(("first", _LOADED)):
            save_adapter(options.base_model, root / name, seed)
        expected = _expected(options, root)
        words = ["--base_model", options.base_model, "--dtype", "float32", "--adapter", f"first={root / 'first'}"]
        with server([*words, "--adapter_root", str(root)], {"MOLA_API_KEY": _TOKEN}) as (url, pid):
            result = asyncio.run(_Run(options, url, pid, expected).go())
    for name, value in result.items():
        print(f"{name}: {value}")
    if output is not None:
        record = {"options": asdict(options), "machine": machine_description(), "versions": software_versions()}
        atomic_write_json(output, record | result)
    return 1 if result["wrong"] or result["unexpected"] else 0


def _expected(options: EnduranceOptions, root: Path) -> dict[tuple[str, str, int | None], str]:
    """Answers by model, prompt and seed; None for greedy."""
    from mola.generation.decoding import generate_text
    from mola.models.loading import load_model
    from mola.models.tokenizer import load_tokenizer

    tokenizer, expected = load_tokenizer(options.base_model), {}
    for name in ("base", "first", _LOADED):
        model = load_model(options.base_model, None if name == "base" else root / name, "float32")
        for prompt, seed in itertools.product([*_PROMPTS, _LONG], (None, 7)):
            values = {} if seed is None else {"temperature": 1.0, "seed": seed}
            expected[name, prompt, seed] = generate_text(
                model, tokenizer, prompt, max_new_tokens=options.max_tokens, **values
            )
    return expected


class _Run:
    def __init__(self, options: EnduranceOptions, url: str, pid: int, expected: dict[Any, str]) -> None:
        self.options, self.url, self.pid, self.expected = options, url, pid, expected
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.unexpected: list[str] = []
        self.memory: list[tuple[float, float]] = []

    async def go(self) -> dict[str, Any]:
        import httpx

        headers = {"Authorization": f"Bearer {_TOKEN}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=600) as self.http:
            before = await self._seconds()
            start, end = time.monotonic(), time.monotonic() + 60 * self.options.minutes
            kinds: list[Callable[[int], Awaitable[None]]] = [getattr(self, f"_{name}") for name in self.options.kinds]
            visitors = [
                self._repeat(kind, end)
                for kind in kinds
                for _ in range(1 if kind == self._loading else self.options.clients)
            ]
            await asyncio.gather(self._watch(start, end), *visitors)
            health = (await self.http.get("/health")).json()
            after = await self._seconds()
        after_a_tenth = [mib for second, mib in self.memory if second > 6 * self.options.minutes]
        settled = after_a_tenth or [mib for _, mib in self.memory]  # one look alone, if the next would be after the end
        return {
            "requests": dict(self.done),
            "wrong": self.wrong[:20],
            "unexpected": self.unexpected[:20],
            "left_at_the_end": health,
            "seconds_of_an_answer": {"before": before, "after": after},
            "memory_mib": {
                "after_a_tenth": settled[0],
                "second_tenth_median": median(settled[: max(1, len(settled) // 9)]),
                "last_tenth_median": median(settled[-max(1, len(settled) // 9) :]),
                "most": max(settled),
            },
            "memory_curve": self.memory,
        }

    async def _repeat(self, visit: Callable[[int], Awaitable[None]], end: float) -> None:
        for number in itertools.count():
            if time.monotonic() > end:
                return
            try:
                await visit(number)
            except Exception as error:  # a lost request
                self.unexpected.append(f"{visit.__name__}: {error!r}")
            self.done[visit.__name__.strip("_")] += 1

    def _body(self, model: str, prompt: str, **values: Any) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "max_tokens": self.options.max_tokens, **values}

    def _check(self, text: str, model: str, prompt: str, seed: int | None = None) -> None:
        if text != self.expected[model, prompt, seed]:
            self.wrong.append(f"{model}, {prompt[:40]!r}, seed {seed}: {text[:80]!r}")

    async def _ask(self, model: str, prompt: str, **values: Any) -> str:
        answer = await self.http.post("/v1/completions", json=self._body(model, prompt, **values))
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    async def _whole(self, number: int) -> None:
        model, prompt = ("base", "first")[number % 2], _PROMPTS[number % 5]
        self._check(await self._ask(model, prompt), model, prompt)

    async def _sampled(self, number: int) -> None:
        model, prompt = ("base", "first")[number % 2], _PROMPTS[number % 5]
        self._check(await self._ask(model, prompt, temperature=1.0, seed=7), model, prompt, 7)

    async def _long(self, number: int) -> None:
        self._check(await self._ask("first", _LONG), "first", _LONG)

    async def _streamed(self, number: int) -> None:
        model, prompt = ("base", "first")[number % 2], _PROMPTS[number % 5]
        self._check("".join([text async for text in self._stream(model, prompt)]), model, prompt)

    async def _leaving(self, number: int) -> None:
        async with contextlib.aclosing(self._stream("first", _PROMPTS[number % 5])) as texts:
            async for _ in texts:
                return

    async def _stream(self, model: str, prompt: str) -> Any:
        body = self._body(model, prompt, stream=True)
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if found := re.match(r"data: ({.*)", line):
                    yield json.loads(found[1])["choices"][0]["text"]

    async def _refused(self, number: int) -> None:
        body = self._body("base", _PROMPTS[0]) | _WRONG[number % len(_WRONG)]
        answer = await self.http.post("/v1/completions", json=body)
        if answer.status_code not in (400, 404):
            self.unexpected.append(f"{_WRONG[number % len(_WRONG)]}: {answer.status_code}")
        await asyncio.sleep(0.5)  # nothing holds these up

    async def _loading(self, number: int) -> None:
        body = {"lora_name": _LOADED, "lora_path": _LOADED}
        (await self.http.post("/v1/load_lora_adapter", json=body)).raise_for_status()
        prompt = _PROMPTS[number % 5]
        self._check(await self._ask(_LOADED, prompt), _LOADED, prompt)
        (await self.http.post("/v1/unload_lora_adapter", json={"lora_name": _LOADED})).raise_for_status()

    async def _seconds(self) -> float:
        """Median of five answers without company."""
        times = []
        for _ in range(5):
            start = time.perf_counter()
            await self._whole(1)
            times.append(time.perf_counter() - start)
        return median(times)

    async def _watch(self, start: float, end: float) -> None:
        while (now := time.monotonic()) < end:
            text = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
            self.memory.append((now - start, int(text.split("VmRSS:")[1].split()[0]) / 1024))
            await asyncio.sleep(self.options.every)


if __name__ == "__main__":
    sys.exit(main())

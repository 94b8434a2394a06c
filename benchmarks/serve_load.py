"""`python -m benchmarks.serve_load`: how `mola serve` behaves under load.

A server in a process of its own serves a base model and two random adapters. Clients query all three in turn. Each
client sends its next request when the last one is answered. Every answer is streamed and compared with the greedy
answer of `mola.generate_text`. `--before` measures a different version of mola in turn with this one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.table import Table

from benchmarks.errors import in_one_line
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.files.terminal import make_table_console
from mola.options.fields import option
from mola.options.parsing import parse

logger = logging.getLogger("benchmarks")

_PROJECT = Path(__file__).resolve().parents[1]
_ADAPTERS = ("first", "second")
_STD = 0.3  # standard deviation of the experts' B and of the routers
_SUBJECTS = ("sun", "sea", "moon", "wind", "rain", "snow", "river", "forest")


@dataclass
class LoadOptions:
    """Options of `python -m benchmarks.serve_load`."""

    base_model: str = option(
        str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Folder of the base model; by default the quickstart's."
    )
    clients: list[int] = field(
        default_factory=lambda: [1, 8, 32, 100],
        metadata={"help": "Numbers of simultaneous clients; each number gives one row."},
    )
    requests: int = option(100, "Requests of one row.")
    max_tokens: int = option(16, "Tokens of each answer.")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one here.")
    max_batch_size: int | None = option(None, "Passed to `mola serve`; by default the server's own default.")
    before: str | None = option(None, "Folder `src` of a different version, measured in turn with this one.")
    output: str | None = option(None, "Result file (JSON).")


@in_one_line("benchmarks.serve_load")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked for.

    Returns:
        The exit code: 0, 1 if an answer differed from that of `mola.generate_text`, 2 for wrong input.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return run(parse(LoadOptions, arguments, prog="python -m benchmarks.serve_load", summary=__doc__ or ""))


def run(options: LoadOptions) -> int:
    """Measure with parsed options; see `main`."""
    if options.before is not None and not (Path(options.before) / "mola").is_dir():
        raise MolaError(f"`before` must be a folder with the package `mola` in it: got {options.before!r}.")
    output = None if options.output is None else check_writable(options.output)
    with tempfile.TemporaryDirectory(prefix="mola-serve-load-") as temporary:
        folders = {name: Path(temporary) / name for name in _ADAPTERS}
        for seed, folder in enumerate(folders.values()):
            _save_adapter(options.base_model, folder, seed)
        expected, rows = _offline(options, folders)
        with ExitStack() as stack:
            words = ["--base_name", "base", "--adapter", *(f"{name}={folder}" for name, folder in folders.items())]
            urls = {"server": stack.enter_context(serving(options, words))[0]}
            if options.before is not None:
                urls["before"] = stack.enter_context(serving(options, words, options.before))[0]
            for clients in options.clients:
                for name, url in urls.items():
                    logger.info("%s, %s clients", name, clients)
                    rows.append(asyncio.run(_load(name, url, expected, clients, options)))
    print_rows(rows)
    if output is not None:
        record = {"options": asdict(options), "machine": machine_description(), "versions": software_versions()}
        atomic_write_json(output, record | {"rows": rows})
    return 1 if any(row.get("wrong") for row in rows) else 0


def _offline(options: LoadOptions, folders: dict[str, Path]) -> tuple[dict[tuple[str, str], str], list[dict[str, Any]]]:
    """Greedy answers by model name and prompt, and rows that say how long they took without a server."""
    from mola.generation.decoding import generate_text
    from mola.models.loading import load_model
    from mola.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.base_model)
    expected, rows = {}, []
    for name, folder in [("base", None), *folders.items()]:
        model = load_model(options.base_model, folder, options.dtype, options.device)
        generate_text(
            model, tokenizer, "A first answer", max_new_tokens=2
        )  # the first call is slower, so it is not timed
        start = time.perf_counter()
        for subject in _SUBJECTS:
            prompt = f"A short story about the {subject}:"
            expected[name, prompt] = generate_text(model, tokenizer, prompt, max_new_tokens=options.max_tokens)
        seconds = time.perf_counter() - start
        rows.append({"what": f"offline, {name}", "requests": len(_SUBJECTS), "seconds": seconds})
    return expected, rows


def _save_adapter(base_model: str, folder: Path, seed: int) -> None:
    """A random mixture far enough from zero that its answers differ from the base's."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from mola import MolaConfig

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_model)
    layers = base.config.num_hidden_layers
    # The paper's 2-4-6-8, if the model has enough layers.
    config = MolaConfig(
        num_experts="2468" if layers >= 4 else 2, r=8, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "mola_B" in name or "mola_router" in name:
            torch.nn.init.normal_(parameter, std=_STD)
    model.save_pretrained(str(folder))


@contextmanager
def serving(options: Any, words: Sequence[str], sources: str | None = None) -> Iterator[tuple[str, int]]:
    """Start `mola serve` on a free port with further `words`; yield its address and the number of its process.

    `sources` is a folder with a different version of mola.
    """
    command = [sys.executable, "-m", "mola.cli", "serve", "--port", "0", *words]
    command += ["--base_model", options.base_model, "--dtype", options.dtype]
    command += ["--max_waiting", str(max(options.clients))]
    command += [] if options.device is None else ["--device", options.device]
    command += [] if options.max_batch_size is None else ["--max_batch_size", str(options.max_batch_size)]
    environment = {name: value for name, value in os.environ.items() if name != "MOLA_API_KEY"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sources is not None:
        environment["PYTHONPATH"] = os.path.abspath(sources)
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stderr=log) as process,
    ):
        try:
            yield _wait_for_address(process, log), process.pid
        finally:
            process.terminate()


def _wait_for_address(process: subprocess.Popen[bytes], log: Any) -> str:
    while True:
        is_running = process.poll() is None
        log.seek(0)
        text = log.read()
        if found := re.search(r"Serving .* on (http://\S+)\n", text):
            return found[1]
        if not is_running:
            raise RuntimeError(f"the server did not start:\n{text}")
        time.sleep(0.1)


async def _load(
    server: str, url: str, expected: dict[tuple[str, str], str], clients: int, options: LoadOptions
) -> dict[str, Any]:
    """Measure one row of results, with `clients` clients that share the requests."""
    from openai import AsyncOpenAI

    questions = list(itertools.islice(itertools.cycle(expected), options.requests))
    pending = iter(questions)
    times: list[tuple[float, float]] = []
    wrong = 0

    async def visit(client: AsyncOpenAI) -> None:
        nonlocal wrong
        for model, prompt in pending:
            start, first, text = time.perf_counter(), None, ""
            stream = await client.completions.create(
                model=model, prompt=prompt, max_tokens=options.max_tokens, stream=True
            )
            async for chunk in stream:
                first = first or time.perf_counter() - start
                text += chunk.choices[0].text
            times.append((first or 0.0, time.perf_counter() - start))
            wrong += text != expected[model, prompt]

    start = time.perf_counter()
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:
        await asyncio.gather(*(visit(client) for _ in range(clients)))
    seconds = time.perf_counter() - start
    firsts, wholes = zip(*times, strict=True)
    return {
        "what": f"{server}, {clients} client{'s' if clients > 1 else ''}",
        "requests": len(times),
        "seconds": seconds,
        "first_text": spread(firsts),
        "answer": spread(wholes),
        "wrong": wrong,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    p95 = quantiles(values, n=20)[-1] if len(values) > 1 else values[0]
    return {"median": median(values), "p95": p95}


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(title="mola serve")
    for name in ("", "requests", "requests/s", "first text, s: median (p95)", "answer, s: median (p95)", "other text"):
        table.add_column(name)
    for row in rows:
        spreads = [
            f"{row[name]['median']:.2f} ({row[name]['p95']:.2f})" if name in row else "-"
            for name in ("first_text", "answer")
        ]
        other = row.get("wrong", "-")
        table.add_row(
            row["what"], str(row["requests"]), f"{row['requests'] / row['seconds']:.2f}", *spreads, str(other)
        )
    make_table_console().print(table)


if __name__ == "__main__":
    sys.exit(main())

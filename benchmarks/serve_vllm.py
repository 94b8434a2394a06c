"""`python -m benchmarks.serve_vllm`: what a mixture costs inside vLLM's server, and whether its answers are mola's.

Two servers of vLLM, one with the base model alone and one with a random mixture on it, and `mola serve` with this
mixture are asked the same in turn, round by round. Requests per second, and per second of processor time of the
server's processes, which a busy machine changes less. Then every prompt once more, texts compared with the greedy ones
of `mola.generate_text`, which is timed on some of them, one after the other. Run it with the Python of an environment
that has vLLM.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.errors import in_one_line
from benchmarks.serve_load import _SUBJECTS, LoadOptions
from benchmarks.serving import save_adapter, server
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.options.fields import option
from mola.options.parsing import parse

logger = logging.getLogger("benchmarks")

_PATIENCE = 600  # seconds for a server to start
# On CPUs: gigabytes for the cache, of which two servers have one each, and threads that may run on any core.
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CONTEXT, _NAME = 1024, "served"
_BASE, _MIXTURE, _MOLA, _GENERATE = "base alone", "mixture", "mola serve, mixture", "generate, mixture"
_ALONE = 16  # prompts that `generate` answers one after the other
_TEXT = (
    "Number {number}. This is the beginning of a report about the {subject}. It was written for people who have never "
    "seen one and want to know what it looks like, where it can be found, what it is good for, and why so many songs "
    "and stories speak of it. The most important thing that anybody should know about the {subject} is"
)


@dataclass
class VllmOptions:
    """Options of `python -m benchmarks.serve_vllm`."""

    base_model: str = option(LoadOptions.base_model, "Folder of the base model; by default the quickstart's.")
    adapter: str | None = option(None, "Folder of a mixture; by default one with random numbers is made.")
    clients: int = option(32, "Clients at the same time.")
    requests: int = option(64, "Requests of one round.")
    rounds: int = option(3, "Rounds of each server; medians are shown.")
    max_tokens: list[int] = field(
        default_factory=lambda: [6, 32], metadata={"help": "Tokens of each answer, one row each."}
    )
    dtype: str = option("float32", "Dtype of both servers: float32, bfloat16 or float16.")
    eager: bool = option(False, "Start the servers with --enforce-eager.")
    output: str | None = option(None, "Result file (JSON).")


@in_one_line("benchmarks.serve_vllm")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked for.

    Returns:
        The exit code: 0, 2 for wrong input.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    run(parse(VllmOptions, arguments, prog="python -m benchmarks.serve_vllm", summary=__doc__ or ""))
    return 0


def run(options: VllmOptions) -> None:
    """See `main`."""
    if not (Path(options.base_model) / "config.json").is_file():
        raise MolaError(f"`base_model` must be a folder that holds a model: got {options.base_model!r}.")
    if min(options.clients, options.requests, options.rounds, *options.max_tokens) < 1:
        raise MolaError("`clients`, `requests`, `rounds` and `max_tokens` must be at least 1.")
    output = None if options.output is None else check_writable(options.output)
    prompts = [
        _TEXT.format(number=number, subject=_SUBJECTS[number % len(_SUBJECTS)]) for number in range(options.requests)
    ]
    with tempfile.TemporaryDirectory(prefix="mola-serve-vllm-") as temporary, ExitStack() as stack:
        adapter = options.adapter
        if adapter is None:
            adapter = str(Path(temporary) / "mixture")
            save_adapter(options.base_model, Path(adapter), 0)
        mixture = ["--load-format", "mola", "--model-loader-extra-config", json.dumps({"adapter": adapter})]
        servers = {
            name: stack.enter_context(_server(name, options, more, Path(temporary)))
            for name, more in ((_BASE, []), (_MIXTURE, mixture))
        }
        words = ["--base_model", options.base_model, "--adapter", f"{_NAME}={adapter}", "--dtype", options.dtype]
        url, number = stack.enter_context(server([*words, "--max_batch_size", str(options.clients)], {}))
        servers[_MOLA] = _Server(url, psutil.Process(number))
        rows = [_row(servers, prompts, max_tokens, options) for max_tokens in options.max_tokens]
        length = options.max_tokens[0]
        texts = {
            name: asyncio.run(_ask(each.url, prompts, options.clients, max_tokens=length))
            for name, each in servers.items()
        }
        stack.pop_all().close()  # the servers, before mola loads the model too
        expected = {folder: _answers_of_mola(options, folder, prompts, length)[0] for folder in (None, adapter)}
        equal = {
            name: sum(map(str.__eq__, texts[name], expected[folder]))
            for name, folder in ((_BASE, None), (_MIXTURE, adapter), (_MOLA, adapter))
        }
        for row in rows:
            row[_GENERATE] = _answers_of_mola(options, adapter, prompts[:_ALONE], row["max_tokens"])[1]
    _print(rows, equal, options)
    if output is not None:
        record = {"options": asdict(options), "machine": machine_description(), "versions": _versions()}
        atomic_write_json(output, record | {"rows": rows, "equal_texts": equal})


class _Server(NamedTuple):
    url: str
    process: psutil.Process

    def processor_seconds(self) -> float:
        """Of all its processes so far; none of them ends while it runs."""
        times = [each.cpu_times() for each in (self.process, *self.process.children(recursive=True))]
        return sum(each.user + each.system for each in times)


@contextmanager
def _server(name: str, options: VllmOptions, more: list[str], folder: Path) -> Iterator[_Server]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.base_model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", _NAME, "--dtype", options.dtype]
    command += ["--max-model-len", str(_CONTEXT), "--max-num-seqs", str(options.clients), *more]
    # Rounds repeat their prompts, which nobody shall remember.
    command += ["--no-enable-prefix-caching", *(["--enforce-eager"] if options.eager else [])]
    logger.info("Starting vLLM, %s.", name)
    log = folder / f"{name}.log"
    with log.open("w") as file, _started(command, file) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield _Server(url, psutil.Process(process.pid))
        finally:
            process.terminate()


def _started(command: list[str], log: IO[str]) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}  # it would ask for it
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_ON_CPU | environment)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise MolaError(f"vLLM's server did not start: {log.read_text(errors='replace')[-3000:]}")


def _row(servers: dict[str, _Server], prompts: Sequence[str], max_tokens: int, options: VllmOptions) -> dict[str, Any]:
    """Medians over rounds of each server, in turn; a first round of each is not counted."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for number in range(options.rounds + 1):
        for name, each in servers.items():
            before, start = each.processor_seconds(), time.perf_counter()
            # mola's server knows no such field; answers that end of themselves are one in a hundred.
            more = {} if name == _MOLA else {"extra_body": {"ignore_eos": True}}
            asyncio.run(_ask(each.url, prompts, options.clients, max_tokens=max_tokens, **more))
            seconds, used = time.perf_counter() - start, each.processor_seconds() - before
            if number:
                seen[name].append((len(prompts) / seconds, len(prompts) / used))
                logger.info("%s, %d tokens: %.2f requests/s, %.2f per CPU second", name, max_tokens, *seen[name][-1])
    row: dict[str, Any] = {"max_tokens": max_tokens}
    for name, pairs in seen.items():
        row[name] = [median(column) for column in zip(*pairs, strict=True)]
    row["ratio"] = [mixture / base for mixture, base in zip(row[_MIXTURE], row[_BASE], strict=True)]
    return row


async def _ask(url: str, prompts: Sequence[str], clients: int, **fields: Any) -> list[str]:
    """Greedy texts of all prompts; clients take one after the other."""
    from openai import AsyncOpenAI

    pending, texts = iter(enumerate(prompts)), [""] * len(prompts)

    async def visit(client: AsyncOpenAI) -> None:
        for number, prompt in pending:
            answer = await client.completions.create(model=_NAME, prompt=prompt, temperature=0, **fields)
            texts[number] = answer.choices[0].text

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:
        await asyncio.gather(*(visit(client) for _ in range(clients)))
    return texts


def _answers_of_mola(
    options: VllmOptions, adapter: str | None, prompts: Sequence[str], max_tokens: int
) -> tuple[list[str], list[float]]:
    """Greedy texts, and how many per second and per second of processor time, after a first one."""
    from mola.generation.decoding import generate_text
    from mola.models.loading import load_model
    from mola.models.tokenizer import load_tokenizer

    model, tokenizer = load_model(options.base_model, adapter, options.dtype), load_tokenizer(options.base_model)
    generate_text(model, tokenizer, prompts[0], max_new_tokens=max_tokens)
    start, used = time.perf_counter(), time.process_time()
    texts = [generate_text(model, tokenizer, prompt, max_new_tokens=max_tokens) for prompt in prompts]
    return texts, [len(texts) / (time.perf_counter() - start), len(texts) / (time.process_time() - used)]


def _versions() -> dict[str, str]:
    import vllm

    return software_versions() | {"vllm": vllm.__version__}


def _print(rows: Sequence[dict[str, Any]], equal: dict[str, int], options: VllmOptions) -> None:
    table = Table(title=f"vLLM, {options.dtype}, {options.clients} clients: requests per second (per CPU second)")
    for name in ("tokens", _BASE, _MIXTURE, "mixture / base", _MOLA, _GENERATE):
        table.add_column(name)
    for row in rows:
        cells = ["{:.2f} ({:.2f})".format(*row[name]) for name in (_BASE, _MIXTURE, "ratio", _MOLA, _GENERATE)]
        table.add_row(str(row["max_tokens"]), *cells)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    for name, count in equal.items():
        print(f"{name}: {count} of {options.requests} texts of {options.max_tokens[0]} tokens are mola.generate_text's")


if __name__ == "__main__":
    sys.exit(main())

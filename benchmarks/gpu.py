"""Measures mola on a GPU in one command: `make bench-gpu`, or `python -m benchmarks.gpu`.

It checks that the kernels are correct on this GPU and that a step does not wait for the host. It measures what a step,
its memory and decoding cost beside LoRA and the frozen base: on SmolLM2, and on two random layers with LLaMA-2-7B's
shapes at 4 x 1,024 tokens. It writes JSON, and tables in Markdown.

`--dry_run` does the same on a CPU, tiny and with Triton interpreted: its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.errors import in_one_line
from benchmarks.models import PROJECT
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, atomic_write_text, check_new_file
from mola.files.environment import machine_description, software_versions

logger = logging.getLogger("benchmarks.gpu")

PROVIDERS = ("--providers", "frozen", "lora_8", "mola")
CASES = "tests/tuner/kernels/gpu/cases.py"
ALL_CASES = "gpu or not gpu"  # the test suite hides the GPU unless the marks name it
_LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
_COPIED = 1 << 30  # bytes
_SQUARE = 8192


class _Job:
    """Runs the parts of the benchmark and keeps their results. If one part fails, the next one runs all the same."""

    def __init__(self, output: Path, *, dry_run: bool, folder: Path) -> None:
        self.output, self.dry_run, self.folder = output, dry_run, folder
        self.device = "cpu" if dry_run else "cuda"
        self.environment = {**os.environ, **({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry_run else {})}
        self.record: dict[str, Any] = {
            "dry_run": dry_run,
            "machine": machine_description(),
            "versions": software_versions() | {"triton": _version("triton")},
            "rates": None,
            "parts": {},
        }

    def run(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> str | None:
        """Run a module in a process of its own; return its output, or None if the module failed."""
        logger.info("%s: python -m %s", name, " ".join(arguments))
        start = time.perf_counter()
        command = [sys.executable, "-m", *arguments]
        environment = {**self.environment, **(environment or {})}
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        part = {"command": arguments, "seconds": round(time.perf_counter() - start, 1), "ok": done.returncode == 0}
        if warned := [line for line in done.stderr.splitlines() if "is not used on" in line]:
            part["warnings"] = (
                warned  # of a kernel that gave wrong results on this GPU, so that a different one was measured
            )
        if done.returncode:
            logger.error("%s failed: %s", name, (done.stdout + done.stderr).strip()[-2000:])
            part["error"] = (done.stdout + done.stderr).strip()[-4000:]
        self.record["parts"][name] = part
        atomic_write_json(self.output, self.record)
        return done.stdout if done.returncode == 0 else None

    def keep(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        """Run a module that prints JSON, and keep the JSON."""
        if (output := self.run(name, *arguments, environment=environment)) is not None:
            self.record["parts"][name]["results"] = json.loads(output)
            atomic_write_json(self.output, self.record)

    def suites(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        """Run suites of `python -m benchmarks`, and keep their rows."""
        results = self.folder / f"{name}.json"
        common = ("--device", self.device, "--dtype", "bfloat16", "--output", str(results), *PROVIDERS)
        self.run(name, "benchmarks", *arguments, *common, environment=environment)
        if results.is_file():  # rows that were finished before a failure are kept, too
            self.record["parts"][name]["results"] = json.loads(results.read_text())["results"]
            atomic_write_json(self.output, self.record)


def measure(output: Path, *, dry_run: bool) -> tuple[dict[str, Any], bool]:
    """Run all parts; return the record, and whether the run was completed without an interruption.

    Args:
        output: JSON file, written after each part.
        dry_run: use the CPU, a tiny model, and interpreted Triton.
    """
    with tempfile.TemporaryDirectory(prefix="mola-bench-gpu-") as place:
        job = _Job(output, dry_run=dry_run, folder=Path(place))
        try:
            _all_parts(job)
        except KeyboardInterrupt:
            return job.record, False
        return job.record, True


def _all_parts(job: _Job) -> None:
    folder, dry_run = job.folder, job.dry_run
    job.record["rates"] = None if dry_run else rates()
    marks = "not slow and not gpu" if dry_run else ALL_CASES
    chosen = ("-k", "fused_True and top_2-dropout_sampled or tried") if dry_run else ()
    job.run("kernels", "pytest", "-q", "-p", "no:cacheprovider", CASES, "-m", marks, *chosen)
    job.keep("waits", "benchmarks.gpu_step", "--device", job.device)
    if torch.version.cuda is None or torch.cuda.is_available():
        job.keep("launches", "benchmarks.launches", "--json", environment={"TRITON_INTERPRET": "0"})
    else:
        logger.warning("Launches are left out: without a GPU they need a build of PyTorch without CUDA.")
    small = folder / "small"
    if dry_run:
        _save(small, _TINY)
        sizes: tuple[str, ...] = ("--batch_size", "1", "--seq_len", "8", "--repeats", "1", "--warmup", "0")
        modes: tuple[str, ...] = ("--decode_batch_sizes", "1")
        wide, tokens = small, ("--growth_layers", "2", "--growth_experts", "8", "--growth_tokens", "8")
    else:
        sizes, modes = ("--repeats", "9", "--warmup", "3"), ()
        wide, tokens = folder / "llama-7b", ("--growth_experts", "2", "4", "6", "8", "--growth_tokens", "4096")
        _save(wide, _LLAMA_7B, weights=False)
    model = str(small) if dry_run else "smollm2"
    for suite in ("step",) if dry_run else ("step", "memory"):
        job.suites(suite, "--suite", suite, "--model", model, *sizes)
    for way in ("eager",) if dry_run else ("eager", "compiled"):
        job.suites(f"decode_{way}", "--suite", "decode", "--model", model, *sizes, *modes, "--decode_modes", way)
    shapes = ("--seq_len", "1024", "--batch_size", "4") if not dry_run else ()
    for dropout in ("0.05",) if dry_run else ("0", "0.05"):
        chosen = ("--suite", "growth", "--model", str(wide), *sizes, *shapes, *tokens, "--dropout", dropout)
        job.suites(f"layers_{dropout}", *chosen)
        job.suites(f"layers_{dropout}_torch", *chosen, environment={"MOLA_KERNEL": "dense"})


def rates() -> dict[str, float]:
    """Bytes per second of a large copy, and operations per second of a large product in bfloat16."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device="cuda")
    square = torch.randn(_SQUARE, _SQUARE, device="cuda").bfloat16()
    found = {}
    for name, work, amount in (
        ("bytes_per_second", lambda: source.clone(), 2.0 * _COPIED),
        ("operations_per_second", lambda: square @ square, 2.0 * _SQUARE**3),
    ):
        times = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        found[name] = amount / sorted(times)[len(times) // 2]
    return found


def _save(folder: Path, shape: dict[str, int], *, weights: bool = True) -> None:
    config = LlamaConfig(**shape, vocab_size=256, max_position_embeddings=4096, pad_token_id=0)
    config.save_pretrained(folder)
    if weights:
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def markdown(record: dict[str, Any]) -> str:
    """The tables of a record in Markdown."""
    machine, parts = record["machine"], record["parts"]
    lines = [f"# {machine['gpu'] or machine['cpu']}", ""]
    if record["dry_run"]:
        lines += ["A dry run on a CPU: no time here means anything.", ""]
    if record["rates"]:
        copied, product = record["rates"]["bytes_per_second"], record["rates"]["operations_per_second"]
        lines += [f"A copy moves {copied / 1e12:.2f} TB/s, a bfloat16 product makes {product / 1e12:.0f} TFLOP/s.", ""]
    versions = (f"{name} {version}" for name, version in record["versions"].items() if version is not None)
    lines += [", ".join(versions) + ".", ""]
    for name, part in parts.items():
        lines += [f"- {name}: {'ok' if part['ok'] else 'FAILED'}, {part['seconds']:.0f} s"]
        lines += [f"  - {warning}" for warning in part.get("warnings", ())]
    columns = ("dropout", "provider", "over LoRA", "over frozen", "peak above frozen, MiB")
    peaks = {(row["provider"], row["dropout"]): row for row in _rows(parts, "memory", "memory")}
    rows = []
    for row in _rows(parts, "step", "step"):
        peak = peaks.get((row["provider"], row["dropout"]), {}).get("peak_bytes_above_frozen")
        cells = (_ratio(row, "lora_8"), _ratio(row, "frozen"), "-" if peak is None else f"{peak / 2**20:.0f}")
        rows.append((str(row["dropout"]), row["provider"], *cells))
    lines += ["", "## A training step, SmolLM2", "", *_table(columns, rows)]
    columns = ("batch", "way", "provider", "over LoRA", "over base")
    rows = [
        (str(row["batch_size"]), row["mode"], row["provider"], _ratio(row, "lora_8"), _ratio(row, "base"))
        for way in ("eager", "compiled")
        for row in _rows(parts, f"decode_{way}", "decode")
    ]
    lines += ["", "## Decoding, SmolLM2", "", *_table(columns, rows)]
    columns = ("dropout", "experts", "tokens", "mola over LoRA", "in torch's operators", "frozen over LoRA")
    rows = []
    for dropout in ("0", "0.05"):
        found, torch_rows = (
            {(row["provider"], str(row["num_experts"]), row["tokens"]): row for row in _rows(parts, name, "growth")}
            for name in (f"layers_{dropout}", f"layers_{dropout}_torch")
        )
        for (provider, experts, tokens), row in found.items():
            if provider == "mola":
                plain = torch_rows.get((provider, experts, tokens), {})
                frozen = found.get(("frozen", experts, tokens), {})
                over = (_ratio(row, "lora_8"), _ratio(plain, "lora_8"), _ratio(frozen, "lora_8"))
                rows.append((dropout, str(row["num_experts"]), f"{tokens:,}", *over))
    lines += ["", "## Two layers with LLaMA-2-7B's shapes", "", *_table(columns, rows)]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _rows(parts: dict[str, Any], name: str, suite: str) -> list[dict[str, Any]]:
    return parts.get(name, {}).get("results", {}).get(suite, [])


def _ratio(row: dict[str, Any], reference: str) -> str:
    found = row.get(f"ratio_to_{reference}")
    return f"{found['median']:.2f}" if found else "-"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *rows)]


@in_one_line("benchmarks.gpu")
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Exit code: 0 if all parts went well, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file; .md beside it (default: results/gpu.json)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--dry_run", action="store_true", help="on a CPU, tiny, with Triton interpreted")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    if not options.dry_run and not torch.cuda.is_available():
        raise MolaError("PyTorch finds no GPU here: nvidia-smi lists the GPUs. --dry_run tries the command on a CPU.")
    usual = Path("results", "gpu_dry_run.json" if options.dry_run else "gpu.json")
    output = check_new_file("output", options.output or usual, options.overwrite)
    record, is_whole = measure(output, dry_run=options.dry_run)
    text = markdown(record)
    atomic_write_text(output.with_suffix(".md"), text)
    print(text)
    if not is_whole:
        print("benchmarks.gpu: interrupted; the parts that were finished are in the files", file=sys.stderr)
        return 130
    return 0 if all(part["ok"] for part in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

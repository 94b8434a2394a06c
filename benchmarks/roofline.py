"""What a GPU should need for an adapted layer, by arithmetic alone: `python -m benchmarks.roofline`.

Nothing is measured. Each kernel takes the larger of its operations over the device's rate and its bytes over the
bandwidth; one runs after the other. Left out: caches that hold what the next kernel reads, and the host's time to
launch, which decides for few tokens (`python -m benchmarks.launches`). A layer is that of LLaMA-2-7B, base and adapters
in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.table import Table

from mola.files.terminal import table_console

LINEARS = (*[(4096, 4096)] * 4, *[(4096, 11008)] * 2, (11008, 4096))  # in, out: q, k, v, o, gate, up, down
R, TOP_K = 8, 2
ALLOCATION = (2, 4, 6, 8)  # experts of a quarter of the layers each
TOKENS, DROPOUT = (512, 4096), (False, True)


class Device(NamedTuple):
    """Rates that a large product and a large copy reach, not those of a data sheet."""

    name: str
    operations: float  # per second
    bandwidth: float  # bytes per second


DEVICES = (Device("A100", 250e12, 1.6e12), Device("H100", 650e12, 2.8e12))


class Kernel(NamedTuple):
    """Operations and bytes of one launch."""

    operations: float
    bytes: float


def product(rows: int, inner: int, columns: int, *, out_bytes: int = 2, adds: bool = False) -> Kernel:
    """`(rows, inner) @ (inner, columns)` in bfloat16, added to what is there if `adds`."""
    moved = 2 * (rows * inner + inner * columns) + rows * columns * out_bytes * (2 if adds else 1)
    return Kernel(2.0 * rows * inner * columns, moved)


def elementwise(*numbers: int) -> Kernel:
    """Reads and writes so many numbers of two bytes."""
    return Kernel(0.0, 2.0 * sum(numbers))


def frozen(n: int, i: int, o: int) -> Iterator[Kernel]:
    """The base's product, and the gradient of its input."""
    yield product(n, i, o)
    yield product(n, o, i)


def lora(n: int, i: int, o: int, *, dropout: bool) -> Iterator[Kernel]:
    """PEFT's LoRA: its scaling and its sum are passes over the whole output."""
    yield from frozen(n, i, o)
    if dropout:
        yield elementwise(n * i, n * i, n * i // 2)  # with a mask of bytes
    yield product(n, i, R)
    yield product(n, R, o)
    yield elementwise(n * o, n * o)
    yield elementwise(n * o, n * o, n * o)
    # Backward.
    yield elementwise(n * o, n * o)
    yield product(R, n, o)
    yield product(n, o, R)
    yield product(R, n, i)
    yield product(n, R, i)
    if dropout:
        yield elementwise(n * i, n * i, n * i // 2)
    yield elementwise(n * i, n * i, n * i)


def mola(n: int, i: int, o: int, num_experts: int, *, dropout: bool) -> Iterator[Kernel]:
    """The kernel `triton`: see `mola.tuner.kernels.gpu.backend`."""
    size, parts = num_experts * R, 3 * num_experts
    yield from frozen(n, i, o)
    yield elementwise(size * i, 2 * num_experts * i, (size + parts) * i)
    if dropout:
        yield elementwise(4)  # a seed
        yield elementwise(n * i, n * i)
        yield product(size, i, n)
        yield product(parts, i, n, out_bytes=4)
        yield elementwise(size * n, 2 * parts * n, 4 * num_experts * n, 4 * TOP_K * n, size * n)
    else:
        yield product(size + parts, i, n, out_bytes=4)
        yield elementwise(2 * (size + parts) * n, 4 * num_experts * n, 4 * TOP_K * n, size * n)
    yield product(n, size, o, adds=True)
    # Backward.
    yield product(size, o, n)
    yield elementwise(2 * size * n, 2 * num_experts * n, (size + num_experts) * n)
    yield product(size, n, o)
    if not dropout:
        yield product(size + num_experts, n, i)
        yield elementwise(num_experts * i, 2 * num_experts * i)  # the router's gradient is float32
        yield product(n, size + num_experts, i, adds=True)
        return
    yield elementwise(n * i, n * i)
    yield product(size, n, i)
    yield product(num_experts, n, i, out_bytes=4)
    yield product(n, size, i)
    yield elementwise(n * i, n * i, n * i)
    yield product(n, num_experts, i, adds=True)


def seconds(kernels: Iterator[Kernel], device: Device) -> float:
    """Of one after the other."""
    return sum(max(each.operations / device.operations, each.bytes / device.bandwidth) for each in kernels)


def measure() -> list[dict[str, Any]]:
    """A row per device, number of tokens and dropout; times of the layers of 2468 are their mean."""
    rows = []
    for device in DEVICES:
        for tokens in TOKENS:
            for dropout in DROPOUT:
                times = {
                    "frozen": sum(seconds(frozen(tokens, *each), device) for each in LINEARS),
                    "lora": sum(seconds(lora(tokens, *each, dropout=dropout), device) for each in LINEARS),
                }
                for num_experts in ALLOCATION:
                    times[f"mola_{num_experts}"] = sum(
                        seconds(mola(tokens, *each, num_experts, dropout=dropout), device) for each in LINEARS
                    )
                times["mola_2468"] = sum(times[f"mola_{each}"] for each in ALLOCATION) / len(ALLOCATION)
                row = {"device": device.name, "tokens": tokens, "dropout": dropout, "seconds": times}
                rows.append(row | {"over_lora": {name: time / times["lora"] for name, time in times.items()}})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args(arguments)
    rows = measure()
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table("device", "tokens", "dropout", "LoRA, ms", "frozen / LoRA", "mola 2468 / LoRA", "8 experts / LoRA")
    for row in rows:
        over = row["over_lora"]
        ratios = [f"{over[name]:.2f}" for name in ("frozen", "mola_2468", "mola_8")]
        dropout = "yes" if row["dropout"] else "no"
        table.add_row(row["device"], f"{row['tokens']:,}", dropout, f"{1e3 * row['seconds']['lora']:.2f}", *ratios)
    table_console().print(table)
    table = Table("linear, 4,096 tokens", "frozen", "LoRA", "mola 2468")
    for i, o in dict.fromkeys(LINEARS):
        mixtures = [work(mola(4096, i, o, num_experts, dropout=False)) for num_experts in ALLOCATION]
        mean = (sum(column) / len(ALLOCATION) for column in zip(*mixtures, strict=True))
        cells = work(frozen(4096, i, o)), work(lora(4096, i, o, dropout=False)), mean
        table.add_row(f"{i:,} to {o:,}", *("{:.0f} GFLOP, {:.0f} MB".format(*each) for each in cells))
    table_console().print(table)
    return 0


def work(kernels: Iterator[Kernel]) -> tuple[float, float]:
    """Billions of operations, and millions of bytes."""
    listed = list(kernels)
    return sum(each.operations for each in listed) / 1e9, sum(each.bytes for each in listed) / 1e6


if __name__ == "__main__":
    sys.exit(main())

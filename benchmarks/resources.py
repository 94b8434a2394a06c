"""`python -m benchmarks.resources`: registers and shared memory of the Triton kernels, compiled without a GPU.

The registers per thread decide how many programs run on a core at once. Spilled bytes mean too few registers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.errors import in_one_line
from mola.errors import MolaError
from mola.files.terminal import make_table_console
from mola.tuner.kernels import native

ARCHITECTURES = (80, 90)  # A100; H100
SIZES = ((2, 8, 2), (8, 8, 2), (8, 16, 2), (32, 8, 2), (64, 16, 6), (8, 64, 2), (64, 64, 8))  # experts, rank, top_k
_WARPS, _TOKENS = 4, 4096
_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")


def measure() -> list[dict[str, Any]]:
    """One row for each combination of kernel, architecture and size.

    Raises:
        MolaError: Triton is not installed, or it interprets its kernels.
    """
    launch = native.load("launch", "gpu")
    if launch is None or launch.IS_INTERPRETED:
        raise MolaError("this needs Triton, and TRITON_INTERPRET not to be 1: pip install triton.")
    jit, rows = launch.jit, []
    for architecture in ARCHITECTURES:
        for num_experts, r, top_k in SIZES:
            tiles, _ = launch._tiles(num_experts, r, _TOKENS)
            same = {"E": num_experts, "R": r, **tiles}
            pointers = {"products": "*fp32", "hidden": "*fp32", "logits": "*fp32", "weights": "*fp32"}
            pointers |= {"indices": "*i64", "gated": "*bf16", "num_tokens": "i32", "scaling": "fp32"}
            constants = same | {"TOP_K": top_k, "STEP": 1.0}
            size = {"architecture": architecture, "num_experts": num_experts, "r": r, "top_k": top_k}
            rows.append(size | _compiled(jit.gates_forward, pointers, constants, architecture))
            pointers = {"grad_gated": "*bf16", "gated": "*bf16", "weights": "*fp32", "grad_logits": "*fp32"}
            pointers |= {"both": "*bf16", "num_tokens": "i32", "scaling": "fp32"}
            rows.append(size | _compiled(jit.gates_backward, pointers, same | {"HAS_GRAD_LOGITS": True}, architecture))
        size = {"architecture": architecture, "num_experts": 8, "r": 8, "top_k": None}
        pointers = {"experts_A": "*fp32", "router": "*fp32", "packed": "*bf16", "in_features": "i32"}
        constants = {"num_rows": 64, "num_experts": 8, "STEP": 1.0, "BLOCK": launch._COLUMNS}
        rows.append(size | _compiled(jit.pack, pointers, constants, architecture))
        pointers = {"source": "*bf16", "seed": "*i64", "target": "*bf16", "num_elements": "i32"}
        constants = {"SEEDS": launch._SEEDS, "STEPS": launch._STEPS, "ADD": True, "BLOCK": launch._QUARTER}
        rows.append(size | _compiled(jit.drop, pointers, constants, architecture))
    return rows


def _compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    # Tensors of torch begin at multiples of 16 bytes.
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name].startswith("*")}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": _WARPS})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(usage)
    if found is None:
        raise MolaError(f"cuobjdump does not report registers: {usage!r}.")
    # Triton requests its shared memory at launch. The tool counts only the system's shared memory.
    return {
        "kernel": kernel.__name__,
        "registers": int(found["registers"]),
        "spilled_bytes": int(found["stack"]) + int(found["local"]),
        "shared_bytes": binary.metadata.shared,
    }


@in_one_line("benchmarks.resources")
def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args(arguments)
    rows = measure()
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    columns = ("kernel", "num_experts", "r", "top_k")
    table = Table("kernel", "experts", "rank", "top_k", *(f"sm_{each}" for each in ARCHITECTURES))
    rows.sort(key=lambda row: tuple(str(row[name]) for name in columns))
    for size, same in itertools.groupby(rows, key=lambda row: tuple(str(row[name]) for name in columns)):
        cells = [f"{row['registers']}, {row['spilled_bytes']}, {row['shared_bytes']}" for row in same]
        table.add_row(*size, *cells)
    table.caption = "registers per thread, bytes spilled, bytes of shared memory per program"
    make_table_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

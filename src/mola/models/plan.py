"""`mola plan`: what an allocation of experts costs for a model, from its configuration alone.

    mola plan --base_model meta-llama/Llama-2-7b-hf --num_experts 2468 --r 8
    mola plan --base_model ./my_model --num_experts inverted_triangle --top_k 2 --json plan.json

The model is built on the meta device: no weights are read, so 70B fits on a laptop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from rich.table import Table

from mola.architecture.allocation import AllocationPlan, LayerPlan
from mola.files.atomic import atomic_write_json
from mola.files.terminal import make_table_console
from mola.models.cost import BatchShape, cost_of_allocation
from mola.models.devices import resolve_device, resolve_dtype
from mola.models.options import PlanOptions
from mola.options.fields import check_results, parse_mapping, split_to_list


def plan(options: PlanOptions) -> AllocationPlan:
    """Count the cost of an allocation for a model, without its weights.

    Raises:
        MolaError: see `cost_of_allocation`.
    """
    options.check()
    dtype, _ = resolve_dtype(options.dtype, resolve_device(None))
    return cost_of_allocation(
        options.base_model,
        options.num_experts,
        options.top_k,
        options.r,
        options.target_modules,
        options.gguf_file,
        options.trust_remote_code,
        with_kernels=True,
        num_experts_pattern=parse_mapping("num_experts_pattern", options.num_experts_pattern),
        rank_pattern=parse_mapping("rank_pattern", options.rank_pattern),
        target_parameters=split_to_list(options.target_parameters or None, "target_parameters"),
        batch=BatchShape(options.batch_size, options.cutoff_len, dtype, options.activation_checkpointing),
    )


def render(plan: AllocationPlan) -> Table:
    """Render the plan as a table: one row per run of equal layers, with the figures of one layer, then the totals."""
    table = Table(title="Experts per decoder layer (each figure is for one layer; last row: all layers)")
    table.add_column("layers")
    for header in (
        "experts",
        "top_k",
        "r",
        "expert parameters",
        "router parameters",
        "FLOPs/token",
        "active FLOPs",
        "size",
    ):
        table.add_column(header, justify="right")
    table.add_column("of base", justify="right")
    for column in table.columns:
        column.overflow = "fold"  # no digit is cut
    for first, last, layer in _runs(plan):
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            str(layer.num_experts),
            str(layer.top_k),
            str(layer.r),
            *_costs(layer),
            _share(layer.expert_parameters + layer.router_parameters, plan.base_parameters),
        )
    table.add_section()
    share = _share(plan.trainable_parameters, plan.base_parameters)
    table.add_row("total", str(plan.num_experts), "", "", *_costs(plan), share, style="bold")
    base = f" of {plan.base_parameters:,} ({share})" if plan.base_parameters else ""
    table.caption = f"trainable {plan.trainable_parameters:,}{base}; adapter {_size(plan.adapter_bytes)} in float32"
    return table


def render_memory(plan: AllocationPlan) -> Table:
    """Render the memory for training and serving as a table in MiB."""
    table = Table()
    table.add_column("MiB")
    for use in plan.memory:
        table.add_column(use, justify="right")
    for part in dict.fromkeys(part for parts in plan.memory.values() for part in parts if part != "total"):
        table.add_row(part, *(f"{parts[part] / 2**20:,.1f}" if part in parts else "" for parts in plan.memory.values()))
    table.add_section()
    table.add_row("total", *(f"{parts['total'] / 2**20:,.1f}" for parts in plan.memory.values()), style="bold")
    return table


def main(options: PlanOptions) -> int:
    """Print the plan as tables, or as JSON if `json` is "-"; returns 0, the exit code."""
    check_results(options)
    result = plan(options)
    if options.json == "-":
        print(json.dumps(result.to_dict(), indent=2))
    else:
        if options.json is not None:
            atomic_write_json(options.json, result.to_dict())
        console = make_table_console()
        console.print(render(result))
        dtype, _ = resolve_dtype(options.dtype, resolve_device(None))
        shape = f"{options.batch_size} x {options.cutoff_len} tokens, base in {str(dtype).removeprefix('torch.')}"
        console.print(f"Memory for {shape}:", highlight=False)
        console.print(render_memory(result))
        for line in result.kernels if options.verbose else ():
            console.print(line, highlight=False, markup=False)
    return 0


def _runs(plan: AllocationPlan) -> Iterator[tuple[int, int, LayerPlan]]:
    for layer, members in groupby(plan.layers, key=lambda layer: replace(layer, layer_index=0)):
        indices = [member.layer_index for member in members]
        yield indices[0], indices[-1], layer


def _costs(item: LayerPlan | AllocationPlan) -> list[str]:
    flops = item.flops_per_token, item.active_flops_per_token
    counts = item.expert_parameters, item.router_parameters, *flops
    return [f"{count:,}" for count in counts] + [_size(item.adapter_bytes)]


def _share(parameters: int, base_parameters: int | None) -> str:
    return f"{parameters / base_parameters:.3%}" if base_parameters else "?"


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"

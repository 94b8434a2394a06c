"""What an allocation of experts costs for a model, without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from mola.architecture.allocation import AllocationPlan, LinearShape, plan_allocation, top_k_of_module
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.notation import default_num_experts, pattern_with, resolve_per_layer
from mola.architecture.patterns import by_pattern, check_pattern
from mola.architecture.targets import find_stacks, linear_shapes, resolve_target_modules
from mola.insight.kernels import TOKENS, inputs_for_shapes, kernel_choices
from mola.models.devices import resolve_dtype
from mola.models.memory import AdaptedLinear, serving_memory, training_memory
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.options.fields import split_names
from mola.tuner.kernels.api import MixtureSettings


def cost_of_allocation(
    base_model: str,
    num_experts: str | None,
    top_k: str,
    r: str,
    target_modules: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    with_kernels: bool = False,
    *,
    num_experts_pattern: Mapping[str, int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    target_parameters: list[str] | None = None,
    model: PreTrainedModel | None = None,
    batch: BatchShape | None = None,
) -> AllocationPlan:
    """Count the cost of an allocation for a model, without its weights.

    The arguments are options of `mola plan`; `num_experts` None means the default for the model's depth.
    `with_kernels` adds the names of the backends that compute the allocation on this machine's CPU.
    `model` is the model on the meta device, if it has been built. `batch` adds the memory for training and serving.

    Returns:
        The plan with `base_parameters`; `plan_allocation` has the formulas.

    Raises:
        MolaError: the model's configuration cannot be read, or an option does not fit the model.
    """
    check_pattern(num_experts_pattern, "num_experts_pattern")
    if num_experts is not None:
        num_experts_pattern = pattern_with(num_experts, num_experts_pattern)
    check_pattern(rank_pattern, "rank_pattern")
    model = model or model_on_meta(base_model, trust_remote_code, gguf_file)
    num_layers = count_decoder_layers(model, base_model)
    targets = split_names(target_modules)
    linears = linear_shapes(model, *resolve_target_modules(model, LayerStacks.of(model), targets))
    chosen = resolve_per_layer(top_k, num_layers, "top_k")
    result = plan_allocation(
        linears,
        default_num_experts(num_layers)
        if num_experts is None
        else resolve_per_layer(num_experts, num_layers, "num_experts"),
        chosen,
        resolve_per_layer(r, num_layers, "r"),
        num_experts_pattern=num_experts_pattern,
        rank_pattern=rank_pattern,
        stacks=find_stacks(model, target_parameters or []),
    )
    sizes = [_sizes_of(linear, result, num_experts_pattern, rank_pattern) for linear in linears]
    if with_kernels:
        result = replace(result, kernels=_kernel_choices(linears, sizes, chosen))
    # `parameters()` yields a tied embedding once.
    result = replace(result, base_parameters=sum(parameter.numel() for parameter in model.parameters()))
    return result if batch is None else replace(result, memory=_memory(model, sizes, result, batch))


class BatchShape(NamedTuple):
    """What the memory of a step depends on besides model and adapter."""

    batch_size: int
    length: int  # in tokens
    dtype: torch.dtype
    checkpointing: bool = False


def _memory(
    model: PreTrainedModel, linears: Sequence[AdaptedLinear], plan: AllocationPlan, batch: BatchShape
) -> dict[str, dict[str, int]]:
    shape: dict[str, Any] = {
        "weight_bytes": (plan.base_parameters or 0) * batch.dtype.itemsize,
        "trainable_parameters": plan.trainable_parameters,
        "itemsize": batch.dtype.itemsize,
        "batch_size": batch.batch_size,
        "length": batch.length,
    }
    training = training_memory(model.config, linears, checkpointing=batch.checkpointing, **shape)
    serving = serving_memory(model.config, **shape)
    return {use: {**asdict(each), "total": each.total} for use, each in (("training", training), ("serving", serving))}


def _sizes_of(
    linear: LinearShape, plan: AllocationPlan, num_experts: Mapping[str, int] | None, rank: Mapping[str, int] | None
) -> AdaptedLinear:
    layer = plan.layers[linear.layer_index or 0]
    experts, r = by_pattern(num_experts, linear.name, layer.num_experts), by_pattern(rank, linear.name, layer.r)
    return AdaptedLinear(experts, r, linear.in_features)


def _kernel_choices(linears: list[LinearShape], sizes: list[AdaptedLinear], top_k: Sequence[int]) -> tuple[str, ...]:
    dtype, _ = resolve_dtype("auto", "cpu")
    calls = []
    for linear, (experts, r, _) in zip(linears, sizes, strict=True):
        # Use the `top_k` of the options: the plan's is 1 in a layer with one expert, whose linears may have more.
        chosen = top_k_of_module(experts, top_k[linear.layer_index or 0], linear.name)
        settings = MixtureSettings(chosen, 1.0, dtype, needs_router_output=False)  # no backend depends on the scale
        for mode in TOKENS:
            shape = linear.in_features, linear.out_features, experts, r
            calls.append((mode, inputs_for_shapes(mode, *shape, settings)))
    return tuple(f"CPU, {str(dtype).removeprefix('torch.')}, {choice}" for choice in kernel_choices(calls))

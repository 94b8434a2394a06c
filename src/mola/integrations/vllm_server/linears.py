"""Find the linears of a checkpoint in vLLM's model, which renames, fuses and slices them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.utils import get_packed_modules_mapping

from mola.errors import MolaError
from mola.integrations.vllm_server.parts import Part, Shard, shards_of, slice_inputs, slice_outputs

# Only these classes are supported: subclasses may compute, load or slice differently.
_LINEARS = (ReplicatedLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)
# These linears are fused in the checkpoint too, with columns in vLLM's order.
_FUSED_IN_CHECKPOINT = ("qkv_proj", "gate_up_proj", "c_attn")
_CURE = "Serve this adapter with `mola serve`, without --engine vllm."


def find_linears(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, list[Part]]:
    """Map the name of each linear in vLLM to its parts, sliced for this rank. Other pipeline stages are left out.

    Raises:
        MolaError: a linear does not exist in vLLM, is quantised, or has a class that is not supported.
    """
    modules, rename = dict(model.named_modules()), _renaming(model)
    packed = {
        name: (whole, number)
        for whole, names in get_packed_modules_mapping(model).items()
        for number, name in enumerate(names)
    }
    found: dict[str, list[Part]] = {}
    for name, part in parts.items():
        place, number = _locate(rename(name), modules, packed)
        if place is None:
            if not _is_on_another_stage(rename(name), modules):
                raise MolaError(
                    f"`adapter` does not fit the model in vLLM: there is no linear {name!r} in its "
                    f"{type(model).__name__}. {_CURE}"
                )
            continue
        layer = modules[place]
        _check_linear(layer, name)
        found.setdefault(place, []).append(_slice(layer, part, number, name))
    return found


def _renaming(model: nn.Module) -> Callable[[str], str]:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    mapper = mapper.get_rename_mapper()
    return lambda name: (mapper.map_name(f"{name}.weight") or name).removesuffix(".weight")


def _locate(name: str, modules: Mapping[str, Any], packed: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """The module that holds a linear, and the linear's index among the module's outputs; None for a single output."""
    if name in modules and not isinstance(modules[name], PPMissingLayer):
        return name, None
    parent, _, leaf = name.rpartition(".")
    whole, number = packed.get(leaf, ("", None))
    place = f"{parent}.{whole}".lstrip(".")
    return (place, number) if whole and place in modules else (None, None)


def _is_on_another_stage(name: str, modules: Mapping[str, Any]) -> bool:
    parts = name.split(".")
    return any(isinstance(modules.get(".".join(parts[:end])), PPMissingLayer) for end in range(1, len(parts) + 1))


def _check_linear(layer: Any, name: str) -> None:
    if type(layer) not in _LINEARS:
        raise MolaError(
            f"`adapter` does not fit the model in vLLM: vLLM computes {name!r} by a {type(layer).__name__}, whose "
            f"input or output a mixture does not reach. {_CURE}"
        )
    if type(layer.quant_method) is not UnquantizedLinearMethod:
        raise MolaError(
            f"`quantization` must be off for adapted linears in vLLM: {name!r} is computed by "
            f"{type(layer.quant_method).__name__}, which may quantise the input that routers read. {_CURE}"
        )


def _slice(layer: Any, part: Part, number: int | None, name: str) -> Part:
    if type(layer) is RowParallelLinear:
        part = slice_inputs(part, layer.tp_rank, layer.tp_size, name, layer.input_size_per_partition)
        return slice_outputs(part, [Shard(layer.output_size, 0, 0, 1)], name)
    part = slice_inputs(part, 0, 1, name, layer.input_size)
    shards = _shards(layer)
    if number is not None and len(shards) > number:
        return slice_outputs(part, [shards[number]], name)
    if len(shards) > 1 and name.rpartition(".")[2] not in _FUSED_IN_CHECKPOINT:
        raise MolaError(
            f"`adapter` does not fit the model in vLLM: vLLM treats {name!r} as several linears, whose columns "
            f"may be in a different order. {_CURE}"
        )
    return slice_outputs(part, shards, name)


def _shards(layer: Any) -> list[Shard]:
    if type(layer) is ReplicatedLinear:
        return [Shard(layer.output_size, 0, 0, 1)]
    copies = getattr(layer, "num_kv_head_replicas", 1)  # copies of each head of keys and values
    sizes = layer.output_partition_sizes
    replicas = [1, copies, copies] if type(layer) is QKVParallelLinear else [1] * len(sizes)
    return shards_of(sizes, layer.tp_rank, layer.tp_size, replicas)

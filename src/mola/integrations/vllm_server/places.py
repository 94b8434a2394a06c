"""Where a model of vLLM has the linears of a checkpoint: by other names, several in one, and in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from mola.integrations.vllm_server.mixture import Part
from mola.integrations.vllm_server.sharding import Shard, of_inputs, of_outputs, shards_of

# Not subclasses, which may compute, load or slice in other ways.
_LINEARS = (ReplicatedLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)
# Fused in the checkpoint too, with columns in vLLM's order.
_FUSED_ALIKE = ("qkv_proj", "gate_up_proj", "c_attn")
_OTHERWISE = "Serve this adapter with `mola serve`, without --engine vllm."


def find_places(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, list[Part]]:
    """Name of a linear in vLLM -> parts of it, in the slices of this rank; those of other pipeline stages are left out.

    Raises:
        MolaError: a linear is nowhere, is no linear in vLLM, is quantised, or computes in a way of its own.
    """
    modules, rename = dict(model.named_modules()), _renaming(model)
    packed = {
        name: (whole, number)
        for whole, names in get_packed_modules_mapping(model).items()
        for number, name in enumerate(names)
    }
    places: dict[str, list[Part]] = {}
    for name, part in parts.items():
        place, number = _locate(rename(name), modules, packed)
        if place is None:
            if not _is_on_another_stage(rename(name), modules):
                raise MolaError(
                    f"`adapter` does not fit the model in vLLM: there is no linear {name!r} in its "
                    f"{type(model).__name__}. {_OTHERWISE}"
                )
            continue
        layer = modules[place]
        _check_linear(layer, name)
        places.setdefault(place, []).append(_slice(layer, part, number, name))
    return places


def _renaming(model: nn.Module) -> Callable[[str], str]:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    mapper = mapper.get_rename_mapper()
    return lambda name: (mapper.map_name(f"{name}.weight") or name).removesuffix(".weight")


def _locate(name: str, modules: Mapping[str, Any], packed: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """The module that holds a linear, and which of its outputs it is; None where it is all of them."""
    if name in modules and not isinstance(modules[name], PPMissingLayer):
        return name, None
    parent, _, leaf = name.rpartition(".")
    whole, number = packed.get(leaf, ("", None))
    place = f"{parent}.{whole}".lstrip(".")
    return (place, number) if whole and place in modules else (None, None)


def _is_on_another_stage(name: str, modules: Mapping[str, Any]) -> bool:
    return any(isinstance(modules.get(above), PPMissingLayer) for above in _above(name))


def _above(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _check_linear(layer: Any, name: str) -> None:
    if type(layer) not in _LINEARS:
        raise MolaError(
            f"`adapter` does not fit the model in vLLM: {name!r} is a {type(layer).__name__} there, whose input or "
            f"output a mixture does not reach. {_OTHERWISE}"
        )
    if type(layer.quant_method) is not UnquantizedLinearMethod:
        raise MolaError(
            f"`quantization` must be off for adapted linears in vLLM: {name!r} is computed by "
            f"{type(layer.quant_method).__name__}, which may quantise the input that routers read. {_OTHERWISE}"
        )


def _slice(layer: Any, part: Part, number: int | None, name: str) -> Part:
    if type(layer) is RowParallelLinear:
        part = of_inputs(part, layer.tp_rank, layer.tp_size, name, layer.input_size_per_partition)
        return of_outputs(part, [Shard(layer.output_size, 0, 0, 1)], name)
    part = of_inputs(part, 0, 1, name, layer.input_size)
    shards = _shards(layer)
    if number is not None and len(shards) > number:
        return of_outputs(part, [shards[number]], name)
    if len(shards) > 1 and name.rpartition(".")[2] not in _FUSED_ALIKE:
        raise MolaError(
            f"`adapter` does not fit the model in vLLM: {name!r} is several linears there, whose columns may be in "
            f"another order. {_OTHERWISE}"
        )
    return of_outputs(part, shards, name)


def _shards(layer: Any) -> list[Shard]:
    if type(layer) is ReplicatedLinear:
        return [Shard(layer.output_size, 0, 0, 1)]
    copies = getattr(layer, "num_kv_head_replicas", 1)  # of the heads of keys and values
    sizes = layer.output_partition_sizes
    replicas = [1, copies, copies] if type(layer) is QKVParallelLinear else [1] * len(sizes)
    return shards_of(sizes, layer.tp_rank, layer.tp_size, replicas)

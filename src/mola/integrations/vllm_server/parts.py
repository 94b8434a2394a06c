"""Reads a mixture from an adapter folder as parts of a server's linears, and slices the parts for one rank.

A server may compute several linears of the checkpoint as one. Each linear of the checkpoint is a `Part` with a router
of its own. This module needs torch and mola, not vLLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mola.checkpoints.adapter_folder import read_tensors
from mola.errors import MolaError
from mola.models.adapters import check_fits
from mola.models.meta import model_on_meta
from mola.serving.vllm_command import check_servable
from mola.tuner import MolaLinear

_PREFIX = "base_model.model."


class PartSettings(NamedTuple):
    """The settings that parts must share to be routed together."""

    num_experts: int
    r: int
    top_k: int
    scaling: float
    router: str


class Part(NamedTuple):
    """The experts of one linear of the checkpoint, inside a linear of a server."""

    settings: PartSettings
    experts_A: torch.Tensor  # `(E, r, in)`
    experts_B: torch.Tensor  # `(E, r, columns)`
    router: torch.Tensor | None  # `(E, in)`; None for one expert
    start: int  # the part's first column in the output of the server's linear


class Adapter(NamedTuple):
    """A mixture as it is served."""

    parts: dict[str, Part]  # name of the linear in the checkpoint -> its part
    digest: str  # hash of everything that compiled code depends on


def read_adapter(folder: str, base_model: str, trust_remote_code: bool = False) -> Adapter:
    """Read a mixture and check that it fits the configuration of a base model.

    Raises:
        MolaError: see `check_servable`, or the mixture does not fit the model.
    """
    config, tensors = check_servable(folder), read_tensors(Path(folder))
    try:
        adapted: Any = check_fits(model_on_meta(base_model, trust_remote_code), config, tensors)
    except MolaError as error:
        raise MolaError(f"`adapter` does not fit the base model: {folder!r}: {error}") from error
    parts = {}
    for name, module in adapted.named_modules():
        if isinstance(module, MolaLinear):
            own = module.settings["default"]
            settings = PartSettings(own.num_experts, own.r, own.top_k, own.scaling, own.router)
            experts_A, experts_B = (tensors[f"{name}.{kind}"] for kind in ("mola_A", "mola_B"))
            router = tensors.get(f"{name}.mola_router")
            parts[name.removeprefix(_PREFIX)] = Part(settings, experts_A, experts_B, router, 0)
    shapes = {name: [*part.settings, *part.experts_B.shape] for name, part in parts.items()}
    return Adapter(parts, hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest())


class Shard(NamedTuple):
    """The slice of one output that a rank holds. A server's linear has several outputs side by side."""

    size: int  # number of columns on this rank
    start: int  # first of these columns in this rank's output
    rank: int  # index of the slice among the equal slices of the whole output
    ranks: int  # number of slices; fewer than ranks if ranks share heads of keys and values


def shards_of(sizes: Sequence[int], rank: int, ranks: int, replicas: Sequence[int]) -> list[Shard]:
    """The slice of each output of a linear that this rank holds.

    Args:
        sizes: number of columns of each output on this rank.
        rank: index of this rank.
        ranks: number of ranks that share the outputs.
        replicas: for each output the number of ranks that hold the same slice.
    """
    return [
        Shard(size, sum(sizes[:number]), rank // copies, ranks // copies)
        for number, (size, copies) in enumerate(zip(sizes, replicas, strict=True))
    ]


def slice_outputs(part: Part, shards: Sequence[Shard], name: str) -> Part:
    """A rank's columns of a linear that has these outputs side by side in the checkpoint.

    Raises:
        MolaError: the linear and the experts have different numbers of outputs.
    """
    whole = [shard.size * shard.ranks for shard in shards]
    _check_size(part.experts_B.shape[2], sum(whole), "outputs", name)
    columns = [
        columns.narrow(2, shard.rank * shard.size, shard.size)
        for columns, shard in zip(part.experts_B.split(whole, dim=2), shards, strict=True)
    ]
    return part._replace(experts_B=torch.cat(columns, dim=2), start=shards[0].start)


def slice_inputs(part: Part, rank: int, ranks: int, name: str, size: int) -> Part:
    """A rank's `size` inputs of a linear, with all of its outputs.

    Raises:
        MolaError: the linear and the experts have different numbers of inputs.
    """
    _check_size(part.experts_A.shape[2], size * ranks, "inputs", name)
    router = part.router if part.router is None else part.router.narrow(1, rank * size, size)
    return part._replace(experts_A=part.experts_A.narrow(2, rank * size, size), router=router)


def _check_size(found: int, expected: int, what: str, name: str) -> None:
    if found != expected:
        raise MolaError(
            f"`adapter` does not fit the model in vLLM: the experts of {name!r} have {found} {what}, vLLM's linear has "
            f"{expected}. Serve this adapter with `mola serve`, without --engine vllm."
        )

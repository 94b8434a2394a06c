"""Which slice of an expert's matrices a rank of several holds: needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mola.errors import MolaError
from mola.integrations.vllm_server.mixture import Part


class Shard(NamedTuple):
    """One of the outputs that a server has side by side in a linear.

    Attributes:
        size: columns of this rank.
        start: the first of them in this rank's output.
        rank: which of the whole's equal slices they are.
        ranks: how many slices there are: fewer than ranks, where ranks share heads of keys and values.
    """

    size: int
    start: int
    rank: int
    ranks: int


def shards_of(sizes: Sequence[int], rank: int, ranks: int, replicas: Sequence[int]) -> list[Shard]:
    """The outputs of a linear, from its sizes on this rank.

    Args:
        sizes: columns of each output here.
        rank: this rank.
        ranks: number of ranks that share the outputs.
        replicas: for each output how many ranks hold the same slice.
    """
    return [
        Shard(size, sum(sizes[:number]), rank // copies, ranks // copies)
        for number, (size, copies) in enumerate(zip(sizes, replicas, strict=True))
    ]


def of_outputs(part: Part, shards: Sequence[Shard], name: str) -> Part:
    """A rank's columns of a linear that the checkpoint has as these outputs together, side by side.

    Raises:
        MolaError: the linear has another number of outputs than the experts.
    """
    whole = [shard.size * shard.ranks for shard in shards]
    _check(part.experts_B.shape[2], sum(whole), "outputs", name)
    columns = [
        columns.narrow(2, shard.rank * shard.size, shard.size)
        for columns, shard in zip(part.experts_B.split(whole, dim=2), shards, strict=True)
    ]
    return part._replace(experts_B=torch.cat(columns, dim=2), start=shards[0].start)


def of_inputs(part: Part, rank: int, ranks: int, name: str, size: int) -> Part:
    """A rank's slice of the inputs; all outputs.

    Raises:
        MolaError: the linear has another number of inputs than the experts.
    """
    _check(part.experts_A.shape[2], size * ranks, "inputs", name)
    router = part.router if part.router is None else part.router.narrow(1, rank * size, size)
    return part._replace(experts_A=part.experts_A.narrow(2, rank * size, size), router=router)


def _check(found: int, wanted: int, what: str, name: str) -> None:
    if found != wanted:
        raise MolaError(
            f"`adapter` does not fit the model in vLLM: the experts of {name!r} have {found} {what}, the linear there "
            f"has {wanted}. This architecture has another form in vLLM: serve it with `mola serve`."
        )

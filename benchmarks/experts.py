"""The same experts in mola and in the loop, which store them differently."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.loop import LoopLinear


class Pair(NamedTuple):
    """One matrix in both.

    Attributes:
        loop: the loop's parameter.
        mola: mola's parameter, which holds all experts.
        place: index of the expert in it.
        transposed: whether mola keeps the transpose.
    """

    loop: Any
    mola: nn.Parameter
    place: Any
    transposed: bool


@torch.no_grad()
def copy_experts(mola: nn.Module, loop: nn.Module) -> list[Pair]:
    """Give the loop the experts and routers of a mola model with the adapter `default`.

    Args:
        mola: where they come from.
        loop: a model with `LoopLinear` in the same places; changed.

    Returns:
        The parameters that hold the same numbers now. The loop's router of a single expert, which changes nothing,
        is in none of the pairs.
    """
    tensors: dict[str, Any] = {name.removeprefix("base_model.model."): each for name, each in mola.named_parameters()}
    pairs = []
    for name, module in loop.named_modules():
        if not isinstance(module, LoopLinear):
            continue
        experts_A, experts_B = (tensors[f"{name}.mola_{part}.default"] for part in "AB")
        for e, (lora_A, lora_B) in enumerate(zip(module.experts_A, module.experts_B, strict=True)):
            pairs += [Pair(lora_A.weight, experts_A, e, False), Pair(lora_B.weight, experts_B, e, True)]
        router = tensors.get(f"{name}.mola_router.default")
        if router is not None:
            pairs.append(Pair(module.router.weight, router, ..., False))
    for pair in pairs:
        source = pair.mola[pair.place]
        pair.loop.copy_(source.t() if pair.transposed else source)
    return pairs

"""The plain way to compute a mixture of LoRA experts: one expert after the other, each on its own tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mola.architecture.allocation import LinearShape


class LoopLinear(nn.Module):
    r"""A linear map with experts in a Python loop, like the description of the research code.

        z = x Wr^T on the input without dropout,   p = softmax(z) in float32
        g = the top_k largest p, divided by their sum
        y = x W^T + b + sum_e g_e * (lora_alpha / r) * B_e A_e dropout_e(x), e on the tokens that chose it

    Every expert has parameters and a dropout mask of its own; its tokens are looked up by index lists, which makes
    the host wait for the device once per expert. A single expert has a router, too, which has no effect.
    Differs from the research code in that the router stays in float32, so that the same experts are chosen as by
    mola, and that logits are not returned. Meant for training steps: float32, or float32 experts under autocast.
    """

    def __init__(
        self, base_layer: nn.Module, num_experts: int, top_k: int, r: int, lora_alpha: float, dropout: float
    ) -> None:
        super().__init__()
        inner, outer = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer
        self.top_k = top_k
        self.scaling = lora_alpha / r
        self.router = nn.Linear(inner, num_experts, bias=False)
        self.experts_A = nn.ModuleList(nn.Linear(inner, r, bias=False) for _ in range(num_experts))
        self.experts_B = nn.ModuleList(nn.Linear(r, outer, bias=False) for _ in range(num_experts))
        self.dropouts = nn.ModuleList(nn.Dropout(dropout) for _ in range(num_experts))
        for linear in (self.router, *self.experts_A):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        for linear in self.experts_B:
            nn.init.zeros_(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(..., in)` to `(..., out)`."""
        result = self.base_layer(x)
        tokens = x.reshape(-1, x.shape[-1])  # (N, in)
        weights, chosen = self._route(tokens)
        update = torch.zeros(tokens.shape[0], result.shape[-1], dtype=result.dtype, device=x.device)
        for index, (lora_A, lora_B, dropout) in enumerate(
            zip(self.experts_A, self.experts_B, self.dropouts, strict=True)
        ):
            rows, places = torch.where(chosen == index)
            if rows.numel() == 0:
                continue
            output = lora_B(lora_A(dropout(tokens[rows]))) * self.scaling
            output = output * weights[rows, places].unsqueeze(-1)
            update.index_add_(0, rows, output.to(update.dtype))
        return result + update.view_as(result)

    def _route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(tokens.device.type, enabled=False):
            probabilities = F.linear(tokens.float(), self.router.weight).softmax(dim=-1)
            weights, chosen = probabilities.topk(self.top_k, dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(tokens.dtype), chosen


def add_loops(
    model: nn.Module,
    linears: Sequence[LinearShape],
    num_experts: Sequence[int],
    top_k: Sequence[int],
    r: int,
    lora_alpha: float,
    dropout: float,
) -> nn.Module:
    """Replace linears of a frozen model by `LoopLinear`, in place.

    Args:
        model: the model.
        linears: the linears to replace.
        num_experts: number of experts for each decoder layer.
        top_k: number of experts used per token, for each decoder layer.
        r: rank of every expert.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        dropout: dropout on the experts' input.

    Returns:
        The model.
    """
    for linear in linears:
        layer = linear.layer_index
        base_layer = model.get_submodule(linear.name)
        loop = LoopLinear(base_layer, num_experts[layer], top_k[layer], r, lora_alpha, dropout)
        parent, _, child = linear.name.rpartition(".")
        setattr(model.get_submodule(parent), child, loop.to(base_layer.weight.device))
    return model


class Pair(NamedTuple):
    """One matrix in both models.

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
    """Copy the experts and routers of a mola model with the adapter `default` into a loop model.

    Args:
        mola: the model to copy from.
        loop: the model to copy into, with a `LoopLinear` for each adapted linear of `mola`.

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

"""Reads the experts of an adapter as plain factors, and lets a model compute with LoRAs in place of its mixtures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from mola.insight.ablation import Experts, replaced_experts
from mola.insight.redundancy import in_float64
from mola.tuner.layer import MolaLinear
from mola.tuner.routing import route_dense

NAME = "default"  # name of the adapter in a model that a command has loaded
Update = tuple[torch.Tensor, torch.Tensor]  # B (out, r) and A (r, in) of an update B A


class Lora(NamedTuple):
    """The factors of an update, in the layout of a layer with one expert.

    Attributes:
        A: `(1, r, in)`.
        B: `(1, r, out)`.
    """

    A: nn.Parameter
    B: nn.Parameter

    @property
    def update(self) -> Update:
        """B and A on the CPU."""
        return self.B[0].detach().t().cpu(), self.A[0].detach().cpu()


class Mixture(NamedTuple):
    """The experts of one module.

    Attributes:
        A: float32 `(E, r, in)`.
        B: float32 `(E, r, out)`, times the scale of the update.
    """

    A: torch.Tensor
    B: torch.Tensor

    @property
    def highest_rank(self) -> int:
        """The highest rank that an update by these experts can have."""
        num_experts, r, in_features = self.A.shape
        return min(num_experts * r, in_features, self.B.shape[2])

    def left(self, gates: torch.Tensor | None = None) -> torch.Tensor:
        """The B of all experts side by side, each times its gate if gates are given: float64 `(out, E r)`."""
        B = in_float64(self.B)
        return (B if gates is None else B * gates.to(B).view(-1, 1, 1)).flatten(0, 1).t()

    def right(self) -> torch.Tensor:
        """The A of all experts below one another: float64 `(E r, in)`."""
        return in_float64(self.A).flatten(0, 1)


def mola_layers(model: nn.Module) -> dict[str, MolaLinear]:
    """The adapted linears of a model by name; the adapter's file uses the same names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MolaLinear)}


def read_mixtures(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, MolaLinear]) -> dict[str, Mixture]:
    """The experts of every module, from the tensors of the adapter's file and the scales of the adapted linears."""
    return {
        name: Mixture(tensors[f"{name}.mola_A"].float(), tensors[f"{name}.mola_B"].float() * layer.scaling[NAME])
        for name, layer in layers.items()
    }


def gated_hidden(layer: MolaLinear, experts_A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`g_e(x) A_e x` of all experts, `(N, E r)`, for `x (N, in)`."""
    num_experts, r, _ = experts_A.shape
    hidden = x @ experts_A.to(x).flatten(0, 1).t()
    if num_experts == 1:
        return hidden
    logits = layer.router_logits(NAME, x)
    gates, _ = route_dense(layer.settings[NAME].router, logits, layer.top_k[NAME], 1)
    return (hidden.view(-1, num_experts, r) * gates.to(x).unsqueeze(2)).flatten(1)


def as_loras(layers: Mapping[str, MolaLinear], updates: Mapping[str, Update]) -> dict[str, Lora]:
    """Updates `(B, A)` of rank R as LoRAs: frozen parameters A `(1, R, in)` and B `(1, R, out)` on the layers' devices.

    They are in float32, or wider like the layer, as PEFT loads LoRAs even on a half-precision base.
    """
    found = {}
    for name, (B, A) in updates.items():
        experts_A = layers[name].mola_A[NAME]
        device, dtype = experts_A.device, torch.promote_types(experts_A.dtype, torch.float32)
        parts = (A.to(device, dtype), B.t().to(device, dtype).contiguous())
        found[name] = Lora(*(nn.Parameter(part.unsqueeze(0), requires_grad=False) for part in parts))
    return found


@contextmanager
def replaced_by_loras(layers: Mapping[str, MolaLinear], loras: Mapping[str, Lora]) -> Iterator[None]:
    """Make the layers compute with LoRAs in place of their experts, until the context ends."""
    with ExitStack() as stack:
        for name, (A, B) in loras.items():
            layer, rank = layers[name], A.shape[1]
            one = replace(layer.settings[NAME], num_experts=1, top_k=1, r=rank, lora_alpha=rank, use_rslora=False)
            stack.enter_context(replaced_experts(layer, NAME, Experts(A, B, None, one)))
        yield

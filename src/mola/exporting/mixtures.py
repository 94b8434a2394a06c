"""The experts of an adapter as plain factors, its layers in a model, and the model with a LoRA in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from mola.tuner.layer import ExpertSettings, MolaLinear
from mola.tuner.routing import route_all

NAME = "default"  # of the adapter in a model that a command has loaded
Update = tuple[torch.Tensor, torch.Tensor]  # B (out, r) and A (r, in): an update B A


class Mixture(NamedTuple):
    """The experts of one module.

    Attributes:
        A: float32 `(E, r, in)`.
        B: float32 `(E, r, out)`, with the scale.
    """

    A: torch.Tensor
    B: torch.Tensor

    def left(self, gates: torch.Tensor | None = None) -> torch.Tensor:
        """float64 `(out, E r)`: all experts side by side, each times its gate."""
        B = self.B.double()
        return (B if gates is None else B * gates.to(B).view(-1, 1, 1)).flatten(0, 1).t()

    def right(self) -> torch.Tensor:
        """float64 `(E r, in)`."""
        return self.A.double().flatten(0, 1)


def mola_layers(model: nn.Module) -> dict[str, MolaLinear]:
    """The adapted linears of a model by name, which is that in the adapter's file."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MolaLinear)}


def mixtures(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, MolaLinear]) -> dict[str, Mixture]:
    """The experts of every module from an adapter's file; `layers` know their scales."""
    return {
        name: Mixture(tensors[f"{name}.mola_A"].float(), tensors[f"{name}.mola_B"].float() * layer.scaling[NAME])
        for name, layer in layers.items()
    }


def gated(layer: MolaLinear, experts_A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`g_e(x) A_e x` of all experts, `(N, E r)`, for `x (N, in)`."""
    num_experts, r, _ = experts_A.shape
    hidden = x @ experts_A.to(x).flatten(0, 1).t()
    if num_experts == 1:
        return hidden
    logits = layer.router_logits(NAME, x)
    gates, _ = route_all(layer.settings[NAME].router, logits, layer.top_k[NAME], 1)
    return (hidden.view(-1, num_experts, r) * gates.to(x).unsqueeze(2)).flatten(1)


@contextmanager
def as_lora(layers: Mapping[str, MolaLinear], updates: Mapping[str, Update]) -> Iterator[None]:
    """Compute with a LoRA in place of the experts, until the context ends.

    Args:
        layers: by module.
        updates: of the same modules.
    """
    kept = {}
    try:
        for name, layer in layers.items():
            old_A, old_B = layer.mola_A[NAME], layer.mola_B[NAME]
            router = layer.mola_router.pop(NAME) if NAME in layer.mola_router else None
            kept[name] = old_A, old_B, router, layer.settings[NAME]
            B, A = updates[name]
            # float32 on a half-precision base, too: so PEFT loads a LoRA.
            like = {"device": old_A.device, "dtype": torch.promote_types(old_A.dtype, torch.float32)}
            layer.mola_A[NAME] = nn.Parameter(A.to(**like).unsqueeze(0), requires_grad=False)
            layer.mola_B[NAME] = nn.Parameter(B.t().to(**like).contiguous().unsqueeze(0), requires_grad=False)
            rank = A.shape[0]
            one = replace(layer.settings[NAME], num_experts=1, top_k=1, r=rank, lora_alpha=rank, use_rslora=False)
            _set(layer, one)
        yield
    finally:
        for name, (old_A, old_B, router, settings) in kept.items():
            layer = layers[name]
            layer.mola_A[NAME], layer.mola_B[NAME] = old_A, old_B
            if router is not None:
                layer.mola_router[NAME] = router
            _set(layer, settings)


def _set(layer: MolaLinear, settings: ExpertSettings) -> None:
    layer.settings[NAME] = settings
    layer.num_experts[NAME], layer.top_k[NAME] = settings.num_experts, settings.top_k
    layer.r[NAME], layer.scaling[NAME] = settings.r, settings.scaling

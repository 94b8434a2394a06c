"""Warnings about routers that do not learn or choose as they should. Each is given once per model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from mola.tuner.layer import MolaLinear

_UNTRAINED = "untrained routers"


class RouterWarnings:
    """Warnings about the routers of one model, and which of them were given."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn_once(self, key: str, message: str) -> None:
        """Give a warning, unless one with this key was given before."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=3)

    def check_gradient(self, adapter_name: str, layers: Sequence[MolaLinear]) -> None:
        """Warn about routers with `top_k=1` in training without a balance loss: they get no gradient."""
        if any(layer.num_experts.get(adapter_name, 1) > 1 and layer.top_k[adapter_name] == 1 for layer in layers):
            self.warn_once(
                f"top_k {adapter_name}",
                f"Adapter {adapter_name!r} has `top_k=1`: the only gate is always 1, so the task loss gives the "
                "router no gradient and it never learns. Set `router_aux_loss_coef` (e.g. 1e-3) or `top_k=2`.",
            )

    def check_precision(self, adapter_name: str, layer: MolaLinear | None) -> None:
        """Warn if the routers of an adapter are in half precision; `layer` is a layer in which it has a router."""
        router = None if layer is None else layer.mola_router._parameters.get(adapter_name)
        if router is not None and router.dtype in (torch.bfloat16, torch.float16):
            self.warn_once(
                f"dtype {adapter_name}",
                f"The routers of adapter {adapter_name!r} are in {router.dtype}: something has cast them, such as "
                "`model.half()`, or TRL, which casts trainable weights of a 4- or 8-bit base. Some tokens may be "
                "routed to different experts, small updates are rounded away, and saving keeps the rounded values. "
                "Load the base model in that dtype instead.",
            )

    def check_training_mode(self, layers: Sequence[MolaLinear]) -> None:
        """Warn if a router is trainable; call it in evaluation mode if the caller computes a loss with gradients."""
        if _UNTRAINED in self._given:  # avoids the loop over all layers
            return
        if any(router.requires_grad for layer in layers for router in layer.mola_router.values()):
            self.warn_once(
                _UNTRAINED,
                "The base model is in evaluation mode, so the losses of its routers are left out of the loss. Call "
                "`model.train()` to train, or compute under `torch.no_grad()` to evaluate.",
            )

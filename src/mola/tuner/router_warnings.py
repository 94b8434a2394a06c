"""What is said, once, about routers that do not learn as they should."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from mola.tuner.layer import MolaLinear

_HALF = (torch.bfloat16, torch.float16)


class RouterWarnings:
    """Warnings about the routers of a model in training; each comes once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def look_at(self, adapter_name: str, layers: Sequence[MolaLinear], *, has_balance_loss: bool) -> None:
        """Warn of a router that learns nothing, or rounds what it learns.

        Args:
            adapter_name: of these.
            layers: of the model.
            has_balance_loss: whether that is switched on.
        """
        routed = [layer for layer in layers if layer.num_experts.get(adapter_name, 1) > 1]
        if not has_balance_loss and any(layer.top_k[adapter_name] == 1 for layer in routed):
            self.warn_once(
                f"top_k {adapter_name}",
                f"Adapter {adapter_name!r} has `top_k=1`: the only gate is always 1, so the task loss gives the "
                "router no gradient and it never learns. Set `router_aux_loss_coef` (e.g. 1e-3) or `top_k=2`.",
            )
        router = routed[0].mola_router[adapter_name] if routed else None
        if router is not None and router.requires_grad and router.dtype in _HALF:
            self.warn_once(
                f"dtype {adapter_name}",
                f"The routers of adapter {adapter_name!r} are trained in {router.dtype}: something has cast them, as "
                "TRL does with trained weights of a 4- or 8-bit base. Small updates are rounded away, also in what is "
                "saved.",
            )

    def look_at_dtype(self, adapter_name: str, layers: Sequence[MolaLinear]) -> None:
        """Warn of routers that something has rounded; arguments as those of `look_at`."""
        dtypes = [each.mola_router[adapter_name].dtype for each in layers if adapter_name in each.mola_router]
        rounded = next((each for each in dtypes if each in _HALF), None)
        if rounded is not None:
            self.warn_once(
                f"dtype {adapter_name}",
                f"The routers of adapter {adapter_name!r} are in {rounded}: something has cast them, as "
                "`model.half()` and `model.to(dtype)` do. Some tokens may get other experts, and saving keeps what was "
                "rounded. Load the base model in that dtype instead.",
            )

    def warn_once(self, key: str, message: str) -> None:
        """Give a warning, unless one with this key was given."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=3)

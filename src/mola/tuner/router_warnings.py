"""What is said, once, about routers that do not learn as they should."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from mola.tuner.layer import MolaLinear

_HALF = (torch.bfloat16, torch.float16)
_LEFT_OUT = "evaluation"


class RouterWarnings:
    """Warnings about the routers of a model in training; each comes once."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        # Of adapters outside of training: a layer with a router, and the dtype that it had.
        self._looked_at: dict[str, tuple[MolaLinear | None, torch.dtype | None]] = {}

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

    def look_outside_training(self, adapter_names: Sequence[str], layers: Sequence[MolaLinear]) -> None:
        """Warn of routers that something has rounded, once an adapter is used; arguments as those of `look_at`."""
        for name in adapter_names:
            first, before = self._looked_at.get(name) or (_with_router(name, layers), None)
            now = first.mola_router[name].dtype if first is not None and name in first.mola_router else None
            if name in self._looked_at and now is before:
                continue
            self._looked_at[name] = first, now
            dtypes = [each.mola_router[name].dtype for each in layers if name in each.mola_router]
            rounded = next((each for each in dtypes if each in _HALF), None)
            if rounded is not None:
                self.warn_once(
                    f"dtype {name}",
                    f"The routers of adapter {name!r} are in {rounded}: something has cast them, as `model.half()` and "
                    "`model.to(dtype)` do. Some tokens may get other experts, and saving keeps what was rounded. Load "
                    "the base model in that dtype instead.",
                )

    def say_left_out(self, layers: Sequence[MolaLinear]) -> None:
        """Warn where routers would be trained in a call that leaves their losses out."""
        if _LEFT_OUT in self._given:  # before a look at every layer
            return
        if any(each.requires_grad for layer in layers for each in layer.mola_router.values()):
            self.warn_once(
                _LEFT_OUT,
                "The base model is in evaluation mode, so the losses of its routers are left out of the loss. Call "
                "`model.train()` to train, or compute under `torch.no_grad()` to evaluate.",
            )

    def warn_once(self, key: str, message: str) -> None:
        """Give a warning, unless one with this key was given."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=3)


def _with_router(adapter_name: str, layers: Sequence[MolaLinear]) -> MolaLinear | None:
    return next((each for each in layers if adapter_name in each.mola_router), None)

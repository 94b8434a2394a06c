"""Warnings about routers that do not learn as they should; each is given once per model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from mola.tuner.layer import MolaLinear

_HALF_PRECISION = (torch.bfloat16, torch.float16)
_UNTRAINED = "untrained experts"


class RouterWarnings:
    """Checks of a model's routers that warn once."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        # For each adapter in inference: one layer with a router, and the dtype that this router had at the last check.
        self._inference_dtypes: dict[str, tuple[MolaLinear | None, torch.dtype | None]] = {}

    def check_routing(self, adapter_name: str, layers: Sequence[MolaLinear], *, has_balance_loss: bool) -> None:
        """Warn if the routers of an adapter in training get no gradient, or are trained in half precision.

        Args:
            adapter_name: the adapter.
            layers: the layers of the model.
            has_balance_loss: whether the balance loss is switched on.
        """
        routed = [layer for layer in layers if layer.num_experts.get(adapter_name, 1) > 1]
        if not has_balance_loss and any(layer.top_k[adapter_name] == 1 for layer in routed):
            self.warn_once(
                f"top_k {adapter_name}",
                f"Adapter {adapter_name!r} has `top_k=1`: the only gate is always 1, so the task loss gives the "
                "router no gradient and it never learns. Set `router_aux_loss_coef` (e.g. 1e-3) or `top_k=2`.",
            )
        router = routed[0].mola_router[adapter_name] if routed else None
        if router is not None and router.requires_grad and router.dtype in _HALF_PRECISION:
            self.warn_once(
                f"dtype {adapter_name}",
                f"The routers of adapter {adapter_name!r} are trained in {router.dtype}: something has cast them, "
                "like TRL, which casts trainable weights of a 4- or 8-bit base. Small updates are rounded away, in the "
                "saved adapter too.",
            )

    def check_inference_routing(self, adapter_names: Sequence[str], layers: Sequence[MolaLinear]) -> None:
        """Warn if something has cast the routers of an adapter to half precision.

        All routers are checked at the first call, and again when the dtype of one router has changed.

        Args:
            adapter_names: the active adapters.
            layers: the layers of the model.
        """
        for name in adapter_names:
            is_known = name in self._inference_dtypes
            layer, known_dtype = self._inference_dtypes.get(name) or (_first_with_router(name, layers), None)
            dtype = layer.mola_router[name].dtype if layer is not None and name in layer.mola_router else None
            if is_known and dtype is known_dtype:
                continue
            self._inference_dtypes[name] = layer, dtype
            dtypes = [each.mola_router[name].dtype for each in layers if name in each.mola_router]
            rounded = next((each for each in dtypes if each in _HALF_PRECISION), None)
            if rounded is not None:
                self.warn_once(
                    f"dtype {name}",
                    f"The routers of adapter {name!r} are in {rounded}: something has cast them, such as "
                    "`model.half()` or `model.to(dtype)`. Some tokens may be routed to different experts, and saving "
                    "keeps the rounded values. Load the base model in that dtype instead.",
                )

    def warn_untrained_experts(self, layers: Sequence[MolaLinear]) -> None:
        """Warn of a call with labels and gradients in evaluation mode, which ignores losses of trainable routers."""
        if _UNTRAINED in self._given:  # avoids the loop over all layers
            return
        if any(router.requires_grad for layer in layers for router in layer.mola_router.values()):
            self.warn_once(
                _UNTRAINED,
                "The base model is in evaluation mode, so the losses of its routers are left out of the loss. Call "
                "`model.train()` to train, or compute under `torch.no_grad()` to evaluate.",
            )

    def warn_once(self, key: str, message: str) -> None:
        """Give a warning, unless one with this key was given before."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=3)


def _first_with_router(adapter_name: str, layers: Sequence[MolaLinear]) -> MolaLinear | None:
    return next((layer for layer in layers if adapter_name in layer.mola_router), None)

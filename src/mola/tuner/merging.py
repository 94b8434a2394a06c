"""Merging the update of a layer with one expert into its base weight; several experts cannot be merged."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from mola.errors import MolaError


def check_no_shared_weights(model: nn.Module, adapters: Collection[str] | None = None) -> None:
    """Refuse to merge into a weight that two modules share, such as that of a head tied to the embeddings.

    The adapters may be of any PEFT method. `adapters` are the names of those to be merged; None means all.

    Raises:
        MolaError: the update of one module would also change a second one.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(_adapted_module(name))
    for name, module in model.named_modules():
        # PEFT merges trainable token embeddings once for both modules.
        if not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer):
            continue
        # Adapters of a layer are keys of `scaling`, and in `StackedParameters` of `settings`.
        names = {*getattr(module, "scaling", {}), *getattr(module, "settings", {})}
        if adapters is not None and names.isdisjoint(adapters):
            continue
        for parameter in module.get_base_layer().parameters(recurse=False):
            others = [other for other in owners.get(id(parameter), ()) if other != _adapted_module(name)]
            if others:
                raise MolaError(
                    f"the adapter cannot be merged: it adapts {name!r}, which shares its weight with {others[0]!r}, so "
                    "the update would change both. Keep it as an adapter, or train it without this module."
                )


def _adapted_module(name: str) -> str:
    """Name of the adapted module of a wrapper or a base layer; PEFT nests wrappers for several parameters."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


class SingleExpertMerging:
    """The part of `MolaLinear` that merges; the layer has the attributes declared here."""

    mola_A: Any
    mola_B: Any
    scaling: dict[str, float]
    num_experts: dict[str, int]
    merged_adapters: list[str]
    active_adapters: Any
    merged: Any
    get_base_layer: Any

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """`(lora_alpha / r) * B A` in the layout of the base weight; for one expert only."""
        self._check_single_expert(adapter_name)
        delta = (self.mola_B[adapter_name][0].t() @ self.mola_A[adapter_name][0]) * self.scaling[adapter_name]
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of adapters with one expert to the base weight.

        Raises:
            MolaError: an adapter has several experts (the gates depend on the input, so no single
                weight is equal to the mixture), or the base layer is quantised.
        """
        layer: Any = self
        names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in self.mola_A]
        for name in names:
            self.check_mergeable(name)
        for name in names:
            weight = self._float_base_weight()
            merged = weight.data + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                # PEFT's words, since programs search for them.
                raise MolaError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken.")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract all merged updates from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            weight = self._float_base_weight()
            weight.data = weight.data - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def _float_base_weight(self) -> torch.Tensor:
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        # Not `isinstance`: packed weights are subclasses of nn.Parameter, some of them with a floating-point dtype.
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise MolaError(
                f"Merging needs a plain floating-point base weight, which this {type(base).__name__} lacks. "
                "Load the base model without quantisation to merge."
            )
        return weight

    def check_mergeable(self, adapter_name: str, where: str = "this module") -> None:
        """Raise MolaError if an adapter has several experts in this module, or the base layer is quantised."""
        self._check_single_expert(adapter_name, where)
        if adapter_name in self.mola_A:
            self._float_base_weight()

    def _check_single_expert(self, adapter_name: str, where: str = "this module") -> None:
        if self.num_experts.get(adapter_name, 1) > 1:
            raise MolaError(
                f"Adapter {adapter_name!r} cannot be merged: {where} has {self.num_experts[adapter_name]} experts and "
                "its gates depend on the input, so no single weight equals the mixture. Keep it as an adapter, or "
                "merge the plain LoRA nearest to it: `mola convert ADAPTER --to lora --r R ...`, then `mola merge`."
            )

    def supports_lora_conversion(self, adapter_name: str | None = None) -> bool:
        """Whether a plain LoRA can express this adapter exactly, by default all adapters: each has one expert."""
        names = self.num_experts if adapter_name is None else [adapter_name]
        return all(self.num_experts.get(name, 1) == 1 for name in names)

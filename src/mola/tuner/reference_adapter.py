"""The reference of TRL's preference trainers: a copy of the adapter that is trained, by the name "ref".

TRL adds it with the very configuration object of the trained adapter and copies the tensors whose names hold
`.default.`. Names of experts and routers end with the adapter's name: TRL would leave the reference with new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters

_REFERENCE = "ref"


def original_of(adapter_name: str, configs: Mapping[str, Any]) -> str | None:
    """The adapter that a new one is to be a copy of: for "ref", one that shares its configuration object."""
    if adapter_name != _REFERENCE:
        return None
    same = [name for name, config in configs.items() if config is configs[adapter_name] and name != adapter_name]
    return same[0] if same else None


@torch.no_grad()
def copy_experts(model: nn.Module, original: str, copy: str) -> None:
    """Give adapter `copy` the experts and routers of adapter `original`, which has the same shapes."""
    for module in model.modules():
        if isinstance(module, (MolaLinear, StackedParameters)):
            for tensors in (getattr(module, name) for name in module.adapter_layer_names):
                if original in tensors:  # with its dtype, which PEFT has cast by now, and that of `copy` not yet
                    trained = tensors[copy].requires_grad
                    tensors[copy] = nn.Parameter(tensors[original].detach().clone(), requires_grad=trained)

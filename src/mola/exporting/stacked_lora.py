"""The LoRAs of a base model's stacked experts as PEFT's `target_parameters` has them in a file, which is exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mola.exporting.mixtures import NAME
from mola.tuner.loading import PREFIX
from mola.tuner.stacked import StackedParameters


def stacked_lora(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], rank: int
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """PEFT's tensors of all stacked experts, and their ranks by name of the parameter.

    Args:
        model: the adapted model, maybe on the meta device.
        tensors: of the adapter's file.
        rank: below it, A and B are filled up with zeros. The scale is 1, in `B`.
    """
    found, ranks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, StackedParameters):
            settings = module.settings[NAME]
            ordered = [each for each, _ in module.base_layer.named_parameters(recurse=False) if each in settings]
            # PEFT has a wrapper for each parameter, and the first one is innermost.
            for depth, parameter in enumerate(reversed(ordered)):
                A, B = (tensors[f"{name}.mola_{part}_{parameter}"].float() for part in "AB")
                ranks[f"{name.removeprefix(PREFIX)}.{parameter}"] = max(rank, A.shape[1])
                missing = (0, 0, 0, max(rank - A.shape[1], 0))
                A, B = nn.functional.pad(A, missing), nn.functional.pad(B, missing) * settings[parameter].scaling
                place = name + ".base_layer" * depth
                found[f"{place}.lora_A.weight"] = A.flatten(0, 1).contiguous()
                found[f"{place}.lora_B.weight"] = B.permute(2, 1, 0).flatten(1).contiguous()
    return found, ranks

"""Writes and reads PEFT's LoRA folders; PEFT itself determines the rank and scale of every module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from mola.architecture.layer_names import PREFIX
from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.plain_lora import check_plain_lora
from mola.errors import MolaError
from mola.exporting.mixtures import NAME
from mola.files.digests import WEIGHTS_FILE
from mola.models.adapters import check_shape, put_lora_into
from mola.tuner.stacked import StackedParameters


class Factors(NamedTuple):
    """The update `scaling * B A` of one module by one LoRA."""

    A: torch.Tensor  # `(r, in)`
    B: torch.Tensor  # `(out, r)`
    scaling: float


def write_lora(
    folder: Path,
    lora: LoraConfig,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    other_tensors: Mapping[str, torch.Tensor],
) -> None:
    """Write a LoRA whose scale is 1 everywhere.

    Args:
        folder: the folder to write to.
        lora: its configuration.
        updates: name of the module in a PeftModel -> `B (out, r)` and `A (r, in)`. A module of a lower rank than
            `lora.r` is filled up with zeros, since more programs read one rank than a rank per module.
        other_tensors: tensors that are not the experts of linears: `modules_to_save` and LoRAs of stacked experts.
    """
    tensors = dict(other_tensors)
    for module, (B, A) in updates.items():
        missing = max(lora.r - A.shape[0], 0)
        padded = {"A": nn.functional.pad(A, (0, 0, 0, missing)), "B": nn.functional.pad(B, (0, missing))}
        tensors |= {f"{module}.lora_{part}.weight": value.float().contiguous() for part, value in padded.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))


def stacked_lora_tensors(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], rank: int
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The LoRAs of a base model's stacked experts, as saved by PEFT for `target_parameters`; the conversion is exact.

    Args:
        model: the adapted model, which may be on the meta device.
        tensors: the content of the mixture's file.
        rank: the LoRAs' lowest rank; A and B of a lower rank are filled up with zeros.

    Returns:
        PEFT's name -> tensor, and name of the parameter -> rank. The LoRAs' scale is 1: `B` includes the mixture's
        scale.
    """
    found, ranks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, StackedParameters):
            settings = module.settings[NAME]
            ordered = [each for each, _ in module.base_layer.named_parameters(recurse=False) if each in settings]
            # PEFT wraps the module once for each parameter; the wrapper of the first parameter is innermost.
            for depth, parameter in enumerate(reversed(ordered)):
                A, B = (tensors[f"{name}.mola_{part}_{parameter}"].float() for part in "AB")
                ranks[f"{name.removeprefix(PREFIX)}.{parameter}"] = max(rank, A.shape[1])
                padding = (0, 0, 0, max(rank - A.shape[1], 0))
                A, B = nn.functional.pad(A, padding), nn.functional.pad(B, padding) * settings[parameter].scaling
                wrapper = name + ".base_layer" * depth
                found[f"{wrapper}.lora_A.weight"] = A.flatten(0, 1).contiguous()
                found[f"{wrapper}.lora_B.weight"] = B.permute(2, 1, 0).flatten(1).contiguous()
    return found, ranks


def read_lora(folder: Path, model_on_meta: nn.Module) -> dict[str, Factors]:
    """Read a LoRA of PEFT, and put it into `model_on_meta`, its base model without weights.

    Returns:
        Name of the module in the base model -> the module's factors.

    Raises:
        MolaError: the adapter is of a different kind, does something that experts cannot, or does not fit the model.
    """
    check_plain_lora(folder, "`source`")
    tensors, model = read_tensors(folder), put_lora_into(model_on_meta, folder)
    found = {}
    for key, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name, scaling = key.removeprefix(PREFIX), layer.scaling.get("default", math.nan)
        if not len(layer.lora_A) or not math.isfinite(scaling):
            raise MolaError(f"`source` must adapt linears with a finite scale: {str(folder)!r} does not in {name!r}.")
        factors = {}
        for part in "AB":
            weight: Any = getattr(layer, f"lora_{part}")["default"].weight
            tensor_name = f"{key}.lora_{part}.weight"
            tensor = check_shape(tensors.pop(tensor_name, None), tuple(weight.shape), tensor_name, folder)
            factors[part] = tensor.float()
        found[name] = Factors(factors["A"], factors["B"], scaling)
        # PEFT also saves the frozen weight of an adapted head or of adapted embeddings.
        tensors.pop(f"{key}.base_layer.weight", None)
    if tensors:
        raise MolaError(f"{str(folder)!r} has a tensor that belongs to no adapted linear: {next(iter(tensors))!r}.")
    return found

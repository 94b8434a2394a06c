"""Whether a LoRA of PEFT fits a model, before the weights of that are loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from mola.checkpoints.tensors import read_tensors
from mola.errors import MolaError


def put_into(model_on_meta: nn.Module, folder: Path) -> Any:
    """The model with the LoRA, as new: other starts need the weights.

    Raises:
        MolaError: PEFT cannot use the configuration, or not for this model.
    """
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path, config.init_lora_weights = None, True
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            return get_peft_model(model_on_meta, config)
    except Exception as error:  # PEFT believes what the file says
        raise MolaError(f"the adapter does not fit the base model: {str(folder)!r}: {error}") from error


def check_lora(folder: Path, model_on_meta: nn.Module, *, all_names: bool = True) -> None:
    """Whether a LoRA fits a model; it may hold more than experts can express.

    Args:
        folder: of the adapter.
        model_on_meta: its base model, without weights; the LoRA is put into it.
        all_names: also refuse a tensor that is missing or unknown. PEFT renames some while it loads.

    Raises:
        MolaError: its configuration is wrong, or a tensor has another shape.
    """
    tensors = {name: each for name, each in read_tensors(folder).items() if "lora_" in name}
    expected = get_peft_model_state_dict(put_into(model_on_meta, folder), save_embedding_layers=False)
    shapes = {name: tuple(each.shape) for name, each in expected.items() if "lora_" in name}
    names = both = shapes.keys() & tensors.keys()
    if all_names:  # but those of a base model's own experts, which PEFT renames while it loads
        names = {name for name in shapes.keys() | tensors.keys() if name in both or ".experts." not in name}
    for name in sorted(names):
        check_shape(tensors.get(name), shapes.get(name), name, folder)


def check_shape(tensor: torch.Tensor | None, expected: tuple[int, ...] | None, name: str, folder: Path) -> torch.Tensor:
    """The tensor.

    Raises:
        MolaError: it is None or not of floating point, or its shape is not the expected one.
    """
    if tensor is None or tuple(tensor.shape) != expected or not tensor.is_floating_point():
        got = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)} and {tensor.dtype}"
        wanted = "no such tensor" if expected is None else str(expected)
        raise MolaError(
            f"the adapter does not fit: {name!r} of {str(folder)!r} {got}, expected {wanted}. Pass the base "
            "model it was trained on, or copy the folder again."
        )
    return tensor

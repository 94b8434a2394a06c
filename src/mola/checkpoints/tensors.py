"""Reads the two files of an adapter folder, whoever wrote them: settings and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mola.errors import MolaError


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        MolaError: it is missing, unreadable, or no JSON object.
    """
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MolaError(f"{path} can not be read: {error}. Point to the folder of the saved adapter.") from error
    if not isinstance(settings, dict):
        raise MolaError(f"{path} must hold an object, got {settings!r}. Point to the folder of the saved adapter.")
    return settings


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder, on the CPU; runs no code from the file.

    Raises:
        MolaError: no weights, two files of weights, or a file that is no flat dict of tensors.
    """
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        if (folder / name).is_file():
            break
    else:
        raise MolaError(f"{folder} holds neither adapter_model.bin nor adapter_model.safetensors.")
    both = (folder / "adapter_model.bin").is_file() and (folder / "adapter_model.safetensors").is_file()
    if both:
        raise MolaError(
            f"{folder} holds adapter_model.bin and adapter_model.safetensors, and they may differ. "
            "Remove the one that is out of date."
        )
    try:
        if name.endswith(".safetensors"):
            return load_file(folder / name)
        # weights_only: a pickle from elsewhere must not be able to run code.
        tensors = torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:
        raise MolaError(f"{folder / name} can not be read as tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise MolaError(f"{folder / name} must hold a flat dict of tensors, it does not.")
    # Saved parameters come back as parameters; only their values are wanted.
    return {key: value.detach() for key, value in tensors.items()}

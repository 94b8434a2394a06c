"""Reads the two files of an adapter folder, whoever wrote them: settings and tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mola.errors import MolaError
from mola.files.digests import WEIGHTS_FILES, check_digest, check_finite, damaged_record
from mola.files.reading import read_json


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        MolaError: it is missing, unreadable, or no JSON object.
    """
    path = folder / "adapter_config.json"
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise MolaError(f"{path} cannot be read: {error}. Point to the folder of the saved adapter.") from error
    if not isinstance(settings, dict):
        raise MolaError(f"{path} must hold an object, got {settings!r}. Point to the folder of the saved adapter.")
    return settings


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder, on the CPU; runs no code from the file.

    Raises:
        MolaError: no weights, two files of weights, a file that is no flat dict of tensors or not the one that was
            saved, or values that are not finite.
    """
    found = [path for name in WEIGHTS_FILES if (path := folder / name).is_file()]
    if not found:
        raise MolaError(f"{folder} holds neither {' nor '.join(WEIGHTS_FILES)}.")
    if len(found) > 1:
        raise MolaError(
            f"{folder} holds {' and '.join(WEIGHTS_FILES)}, and they may differ. Remove the one that is out of date."
        )
    (path,) = found
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except Exception as error:
        raise MolaError(
            f"{path} cannot be read as tensors: {error}. Copy it again if it was cut off or damaged, or use a "
            "checkpoint of the run."
        ) from error
    check_digest(folder)
    check_finite(tensors, str(path))
    return tensors


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    damaged = damaged_record(path)
    if damaged:
        raise ValueError(f"its part {damaged!r} does not have the checksum it was written with")
    # weights_only: a pickle from elsewhere must not be able to run code.
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError("it must hold a flat dict of tensors, and does not")
    odd = next((key for key, value in tensors.items() if not isinstance(key, str) or not _is_plain(value)), None)
    if odd is not None:
        raise ValueError(f"it must hold dense tensors under names, each with all of its values, and {odd!r} is none")
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    if sum(value.nbytes for value in tensors.values()) > 2 * sum(held.values()):  # tied weights stand there twice
        raise ValueError("its tensors share memory, and would need more than twice what it holds")
    # Saved parameters come back as parameters, and shared memory cannot be saved again: only values are wanted.
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def adapted_modules(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the modules that have experts in an adapter of mola, as in its file."""
    return [key.removesuffix(".mola_A") for key in tensors if key.endswith(".mola_A")]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Dense, on the CPU, and no small storage that claims to be a large tensor."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()

"""The weights of an adapter folder: as tensors, or as numpy arrays without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import deserialize

from mola.errors import MolaError
from mola.files.digests import WEIGHTS_FILES, check_digest, check_finite, find_damaged_part

if TYPE_CHECKING:
    import torch

_FORMATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder, on the CPU; runs no code from the file.

    Raises:
        MolaError: there are no weights or two weights files, the file is no flat dict of tensors or was changed
            since it was saved, or values are not finite.
    """
    return _read(folder, _load_tensors)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The weights of an adapter folder as arrays; without torch, unless a file or a number format needs it.

    Raises:
        MolaError: see `read_tensors`.
    """
    return _read(folder, _load_arrays)


def _read(folder: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    found = [path for name in WEIGHTS_FILES if (path := folder / name).is_file()]
    if not found:
        raise MolaError(
            f"{folder} holds neither {' nor '.join(WEIGHTS_FILES)}. Was the training interrupted before it saved?"
        )
    if len(found) > 1:
        raise MolaError(
            f"{folder} holds {' and '.join(WEIGHTS_FILES)}, and they may differ. Remove the one that is out of date."
        )
    (path,) = found
    try:
        tensors = load(path)
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        raise MolaError(
            f"{path} cannot be read as tensors: {error}. Copy it again if it was cut off or damaged, or use a "
            "checkpoint of the run."
        ) from error
    check_digest(folder)
    check_finite(tensors, str(path))
    return tensors


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if damaged := find_damaged_part(path):  # torch.load does not compare checksums
        raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    # weights_only: a pickle from elsewhere must not run code.
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError("it does not hold a flat dict of tensors")
    # Saved parameters come back as parameters, and tensors may share memory, which safetensors does not save.
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    arrays = _read_safetensors(path) if path.suffix == ".safetensors" else None
    if arrays is None:
        arrays = {name: tensor.double().numpy() for name, tensor in _load_tensors(path).items()}
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray] | None:
    """The tensors of a file; None if one of them has a format that numpy does not know."""
    arrays = {}
    for name, tensor in deserialize(path.read_bytes()):
        kind, data = tensor["dtype"], tensor["data"]
        if kind == "BF16":  # the upper half of a float32
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in _FORMATS:
            values = np.frombuffer(data, _FORMATS[kind])
        else:
            return None
        arrays[name] = values.reshape(tensor["shape"])
    return arrays


def adapted_modules(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the modules that have experts in an adapter of mola, as its file names them."""
    return [key.removesuffix(".mola_A") for key in tensors if key.endswith(".mola_A")]

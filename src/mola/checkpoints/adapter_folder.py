"""The tensors of an adapter folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from mola.errors import MolaError
from mola.files.digests import WEIGHTS_FILES, check_digest, check_finite, find_damaged_part


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder, on the CPU; runs no code from the file.

    Raises:
        MolaError: there are no weights or two weights files, the file is no flat dict of tensors or was changed
            since it was saved, or values are not finite.
    """
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
        tensors = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        raise MolaError(
            f"{path} cannot be read as tensors: {error}. Copy it again if it was cut off or damaged, or use a "
            "checkpoint of the run."
        ) from error
    check_digest(folder)
    check_finite(tensors, str(path))
    return tensors


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    if damaged := find_damaged_part(path):  # torch.load does not compare checksums
        raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    # weights_only: a pickle from elsewhere must not run code.
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError("it does not hold a flat dict of tensors")
    # Saved parameters come back as parameters, and tensors may share memory, which safetensors does not save.
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def adapted_modules(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the modules that have experts in an adapter of mola, as its file names them."""
    return [key.removesuffix(".mola_A") for key in tensors if key.endswith(".mola_A")]

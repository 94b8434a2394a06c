"""The files of an adapter folder: its settings, its tensors, and which program wrote them."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mola.errors import MolaError
from mola.files.digests import WEIGHTS_FILES, check_digest, check_finite, find_damaged_part
from mola.files.reading import read_json


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        MolaError: the file is missing, unreadable, or no JSON object.
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


# The first versions of MoE-PEFT write these settings and no others. PEFT, and so mola, always writes more.
_MOE_PEFT_ALWAYS = {
    "peft_type",
    "num_experts",
    "top_k",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "target_modules",
    "base_model_name_or_path",
    "task_type",
}
_MOE_PEFT_SOMETIMES = {"use_dora", "use_rslora"}


def foreign_format(settings: Mapping[str, Any]) -> str | None:
    """The format of an adapter that PEFT cannot load, given the parsed `adapter_config.json`.

    Returns:
        A value of `mola convert --from`: "published" (`r` is a list in an adapter of type LORA), or "moe_peft"
        (MoE-PEFT also calls its method MOLA, but writes other files). None for everything else.
    """
    peft_type = settings.get("peft_type")
    if peft_type == "LORA" and isinstance(settings.get("r"), list):
        return "published"
    is_first_version = _MOE_PEFT_ALWAYS <= settings.keys() <= _MOE_PEFT_ALWAYS | _MOE_PEFT_SOMETIMES
    if peft_type == "MOLA" and ("routing_strategy" in settings or is_first_version):
        return "moe_peft"
    return None


def conversion_hint(settings: Mapping[str, Any], folder: str) -> str | None:
    """The command that converts an adapter from a different program; None for adapters that PEFT can load."""
    found = foreign_format(settings)
    if found is None:
        return None
    name, top_k = {
        "published": ("of the paper's research code", " --top_k K (the number used in its training)"),
        "moe_peft": ("of MoE-PEFT", ""),
    }[found]
    return (
        f"{folder!r} is an adapter {name}, which must be converted first: "
        f"mola convert {shlex.quote(folder)} --from {found} --base_model MODEL --output NEW_FOLDER{top_k}"
    )

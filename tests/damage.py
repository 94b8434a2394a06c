"""What can happen to the files of an adapter, done on purpose."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def change_settings(folder: Path, **changes) -> None:
    """Other fields in `adapter_config.json`; None removes one."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}), encoding="utf-8")


def change_tensors(folder: Path, change) -> None:
    """`change` gets the tensors by name, and changes them in place; the digest of those before is removed."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    change_settings(folder, weights_sha256=None)


def flip_bit(path: Path, number: int) -> None:
    """Bit `number` of a file, counted from its start, the other way round."""
    content = bytearray(path.read_bytes())
    content[number // 8] ^= 1 << number % 8
    path.write_bytes(content)


def cut_off(path: Path, share: float) -> None:
    """Only the first part of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def same(one, two):
    """Whether two contents of a file of `torch.save` are equal."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return bool(np.all(one == two))

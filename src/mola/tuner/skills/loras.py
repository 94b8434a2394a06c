"""The LoRAs of skills: checked when they are added, read when they are asked for first, a bounded number in memory."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from mola.architecture.layer_names import PREFIX
from mola.architecture.linears import is_adaptable, is_read_without_call, linear_sizes, original_modules
from mola.errors import MolaError
from mola.files.digests import CONFIG_FILE, WEIGHTS_FILE, file_sha256
from mola.files.reading import read_json

DEFAULT_MAX_LOADED = 64
_ENDS = {".lora_A.weight": "down", ".lora_B.weight": "up"}


class LinearLora(NamedTuple):
    """What a LoRA adds to the output of one linear for the input `x`: `scale * up (down x)`.

    Attributes:
        down: `(r, in)`.
        up: `(out, r)`.
        scale: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float


class LoraStore:
    """The LoRAs of all skills of a model, by name.

    Args:
        model: the base model.
        max_loaded: maximum number of LoRAs in memory, at least 1. While a batch asks for more skills than that at
            once, all of them stay.

    Raises:
        MolaError: `max_loaded` is below 1.
    """

    def __init__(self, model: nn.Module, max_loaded: int = DEFAULT_MAX_LOADED) -> None:
        if max_loaded < 1:
            raise MolaError(f"`max_loaded` must be at least 1: got {max_loaded}.")
        self.max_loaded = max_loaded
        self.linears = {name: module for name, module in original_modules(model) if is_adaptable(module)}
        self._not_called = {name for name in self.linears if is_read_without_call(model, name)}
        self._probe = next(model.parameters())
        self._placement: Any = None
        self._folders: dict[str, Path] = {}
        self._digests: dict[str, str | None] = {}
        self._loaded: OrderedDict[str, dict[str, LinearLora]] = OrderedDict()  # least recently asked first

    @property
    def names(self) -> list[str]:
        """Names of all skills, sorted."""
        return sorted(self._folders)

    @property
    def is_empty(self) -> bool:
        """Whether there are no skills."""
        return not self._folders

    @property
    def loaded(self) -> list[str]:
        """Names of the skills in memory, least recently asked first."""
        return list(self._loaded)

    def add(self, name: str, folder: str | os.PathLike[str], sha256: str | None = None) -> list[str]:
        """Check a LoRA and add it, without reading its tensors.

        Args:
            name: a new name.
            folder: the LoRA in PEFT's format.
            sha256: of its file of tensors, which is compared when they are read; None compares nothing.

        Returns:
            Names of the linears that it adapts.

        Raises:
            MolaError: the name is taken, or the LoRA does not fit the model or has parts that a skill cannot have.
        """
        if name in self._folders:
            raise MolaError(f"the skill {name!r} exists already. Remove it first, or choose a different name.")
        with _open(Path(folder)) as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - is no dict
        adapted = self.check(name, shapes)
        self._folders[name], self._digests[name] = Path(folder), sha256
        return adapted

    def remove(self, name: str) -> None:
        """Remove a skill.

        Raises:
            MolaError: there is no such skill.
        """
        self.check_names([name])
        del self._folders[name], self._digests[name]
        self._loaded.pop(name, None)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise a MolaError that names a skill that does not exist."""
        for name in names:
            if name not in self._folders:
                known = ", ".join(self.names[:20]) or "none"
                raise MolaError(
                    f"there is no skill {name!r}. Skills: {known}{', ...' if len(self.names) > 20 else ''}."
                )

    def get(self, names: Iterable[str]) -> dict[str, dict[str, LinearLora]]:
        """The LoRAs of some skills: skill -> linear -> tensors, in the dtype and on the device of the linears.

        Raises:
            MolaError: there is no such skill, or its file was changed.
        """
        names = list(dict.fromkeys(names))
        self.check_names(names)
        if self._placement != (placement := self.placement()):
            self._loaded.clear()
            self._placement = placement
        for name in names:
            if name not in self._loaded:
                self._loaded[name] = self._read(self._folders[name], self._digests[name])
            self._loaded.move_to_end(name)
        while len(self._loaded) > max(self.max_loaded, len(names)):
            self._loaded.popitem(last=False)
        return {name: self._loaded[name] for name in names}

    def touch(self, names: Iterable[str]) -> None:
        """Note that some skills are asked again, whose tensors need not be read."""
        for name in dict.fromkeys(names):
            if name in self._loaded:
                self._loaded.move_to_end(name)

    def placement(self) -> Any:
        """Device and dtype of the model, which change if the model is moved or cast after skills were read."""
        return self._probe.device, self._probe.dtype

    def check(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Check a LoRA by the names and shapes of its tensors; see `add`."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key in _parts(shapes):
            module, part = _split_key(key)
            if module is None:
                raise MolaError(
                    f"the skill {name!r} has the tensor {key!r}: a skill is a LoRA on linears alone, without trained "
                    "embeddings, biases, magnitudes (DoRA) or whole modules. Train it without them."
                )
            found.setdefault(module, {})[part] = shapes[key]
        for module, parts in found.items():
            if reason := self._why_no_target(module):
                raise MolaError(f"the skill {name!r} adapts {module!r}, {reason}.")
            size_in, size_out = linear_sizes(self.linears[module])
            rank = parts.get("down", (0,))[0]
            if not rank or parts != {"down": (rank, size_in), "up": (size_out, rank)}:
                raise MolaError(
                    f"the skill {name!r} does not fit the base model: its tensors of {module!r} are {parts}, and the "
                    f"linear has {size_in} inputs and {size_out} outputs. Was it trained on a different model?"
                )
        return list(found)

    def _why_no_target(self, module: str) -> str | None:
        if module not in self.linears:
            return "which is no linear of the base model"
        if ".experts." in module:
            return "an expert of the base model, which reads tokens of several rows at once. Leave experts out"
        if module in self._not_called:
            return "whose weight the base model reads without calling the linear. Leave it out"
        return None

    def _read(self, folder: Path, sha256: str | None) -> dict[str, LinearLora]:
        if sha256 is not None and file_sha256(folder / WEIGHTS_FILE) != sha256:
            raise MolaError(
                f"{str(folder / WEIGHTS_FILE)!r} is not the file that was added as a skill. Copy the folder again, or "
                "add the skill again."
            )
        settings = read_json(folder / CONFIG_FILE)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        # A skill may be asked for first in inference mode, whose tensors training could not use later.
        with torch.inference_mode(False), torch.no_grad(), _open(folder) as file:
            for key in _parts(file.keys()):
                module, part = _split_key(key)
                parts.setdefault(str(module), {})[part] = _like_weight(file.get_tensor(key), self.linears[str(module)])
        return {
            module: LinearLora(both["down"], both["up"], lora_scale(settings, module, len(both["down"])))
            for module, both in parts.items()
        }


def lora_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor by which PEFT multiplies a LoRA's output for one linear; `settings` is its `adapter_config.json`."""
    alphas: dict[str, float] = settings.get("alpha_pattern") or {}
    alpha: float = alphas.get(get_pattern_key([*alphas], module), settings["lora_alpha"])
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _like_weight(tensor: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """A tensor in the dtype of a linear's weight and on its device; a packed weight leaves the dtype as it is."""
    weight: Any = linear.weight
    is_packed = weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return tensor.to(weight.device, None if is_packed else weight.dtype)


def _split_key(key: str) -> tuple[str | None, str]:
    """The linear and the part ("down" or "up") of a tensor in an adapter file; None if it is no part of a linear."""
    for end, part in _ENDS.items():
        if key.startswith(PREFIX) and key.endswith(end):
            return key.removeprefix(PREFIX).removesuffix(end), part
    return None, ""


def _parts(keys: Iterable[str]) -> list[str]:
    """Names of an adapter's tensors, without frozen weights of the base model, which PEFT may save too."""
    return [key for key in keys if not key.endswith(".base_layer.weight")]


def _open(folder: Path) -> Any:
    path = folder / WEIGHTS_FILE
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise MolaError(f"{str(path)!r} cannot be read: {error}. Copy the skill's folder again.") from error

"""Which layer a module belongs to, and how many layers a model has.

`LayerStacks` finds them in a whole model, which may have an encoder, or towers for images or sound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from mola.architecture.layer_names import DEPTH_KEYS, count_layers, layer_index
from mola.architecture.linears import is_adaptable

Names = list[str] | set[str] | str


@dataclass(frozen=True)
class LayerStacks:
    """The layers of a model that each get a number of experts, lowest first.

    - A decoder, or an encoder: its layers.
    - An encoder-decoder: the encoder's layers, then the decoder's. Each layer has a number of experts of its own.
    - A language model beside towers for images or sound: the layers of the language model only.

    Attributes:
        num_layers: number of layers; None if neither the config nor module names show it.
        num_encoder_layers: number of layers in the encoder of an encoder-decoder; 0 for other models.
        encoder_decoder_names: names of the two lists of layers of an encoder-decoder, the encoder's and the decoder's;
            empty for other models.
        language_model: name of the language model, or of its list of layers, if the model has other submodules. None
            for an encoder-decoder, and for a model that is nothing but a language model.
        has_towers: whether an encoder-decoder has further lists of layers, such as those for images.
    """

    num_layers: int | None
    num_encoder_layers: int = 0
    encoder_decoder_names: tuple[str, ...] = field(default=(), compare=False)
    language_model: str | None = None
    has_towers: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> LayerStacks:
        """Find the layers of a model, from its modules and its `config` if it has one; its weights are not read."""
        model_config: Mapping[str, Any] = config_of(model) or {}
        names, lists = [name for name, _ in model.named_modules()], _layer_lists(model)
        if model_config.get("is_encoder_decoder") and (both := _encoder_and_decoder(lists)):
            encoder_size, decoder_size = (lists[name] for name in both)
            return cls(encoder_size + decoder_size, encoder_size, both, has_towers=len(lists) > len(both))
        language_model = _language_model(model, model_config)
        if language_model is not None:
            within = f"{language_model}."
            names = [name for name in names if name.startswith(within)]
            lists = {name: size for name, size in lists.items() if f"{name}.".startswith(within)}
            model_config = config_of(model.get_submodule(language_model)) or model_config
        depth = count_layers(model_config, names)
        sizes = {*lists.values()}
        if len(sizes) == 1 and depth not in sizes:
            # ALBERT's config says how often its layers run. Its depth is the length of its list, because a layer that
            # runs several times has one number of experts.
            within_lists = tuple(f"{name}." for name in lists)
            modules = dict(model.named_modules())
            numbered = [name for name in names if layer_index(name) is not None and is_adaptable(modules[name])]
            if all(name.startswith(within_lists) for name in numbered):
                depth = sizes.pop()
        return cls(depth, language_model=language_model)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the submodules that contain the layers; empty if the model has no other submodules."""
        if self.has_towers:
            return self.encoder_decoder_names
        return (self.language_model,) if self.language_model else ()

    def index(self, module_name: str) -> int | None:
        """Layer of a module, 0 = nearest the input; None for modules outside the layers."""
        if self.parts and not module_name.startswith(tuple(f"{part}." for part in self.parts)):
            return None
        if not self.encoder_decoder_names:
            return layer_index(module_name)
        for name, first in zip(self.encoder_decoder_names, (0, self.num_encoder_layers), strict=True):
            if module_name.startswith(f"{name}."):
                index = layer_index(module_name.removeprefix(f"{name}."))
                return None if index is None else first + index
        return None

    def is_encoder(self, index: int | None) -> bool:
        """Whether a layer belongs to the encoder of an encoder-decoder."""
        return index is not None and index < self.num_encoder_layers

    def also_excluding_towers(self, exclude_modules: Names | None) -> Names | None:
        """`exclude_modules`, extended to exclude modules outside the language model, such as image or sound towers.

        A model without towers leaves `exclude_modules` unchanged.
        """
        if not self.parts:
            return exclude_modules
        language_model = "|".join(map(re.escape, self.parts))
        outside = rf"(?!(?:{language_model})\.).*"
        if exclude_modules is None:
            return outside
        if not isinstance(exclude_modules, str):
            exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, sorted(exclude_modules)))})"
        return f"{exclude_modules}|{outside}"  # the user's expression first: regex flags may only appear at the start


def _layer_lists(model: nn.Module) -> dict[str, int]:
    """Name -> length of the lists of layers, which are lists whose entries contain linears. Inner lists do not count.

    Lists whose entries are linears themselves, such as several heads, count only if there are no lists of layers.
    """
    found: dict[str, int] = {}
    lists_of_linears: dict[str, int] = {}
    for name, module in model.named_modules():
        if not name or not isinstance(module, nn.ModuleList) or layer_index(name) is not None:
            continue
        if any(is_adaptable(entry) for entry in module):
            lists_of_linears[name] = len(module)
        elif any(is_adaptable(part) for part in module.modules() if part is not module):
            found[name] = len(module)
    return found or lists_of_linears


def _encoder_and_decoder(lists: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the encoder's and the decoder's list of layers; empty unless both exist.

    Towers have encoders too. The text encoder is the encoder whose name has the most first parts in common with the
    decoder's name.
    """
    encoders, decoders = ([name for name in lists if _role(name) == role] for role in ("encoder", "decoder"))
    if not decoders or not encoders:
        return ()
    decoder = min(decoders, key=lambda name: name.count("."))

    def nearness(name: str) -> tuple[int, int]:
        pairs = zip(name.split("."), decoder.split("."), strict=False)
        return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)]), -name.count(".")

    return max(encoders, key=nearness), decoder


def _role(module_name: str) -> str | None:
    """The first part of a name that is "encoder" or "decoder", with or without "text_"; None if no part is."""
    parts = (part.removeprefix("text_") for part in module_name.split("."))
    return next((part for part in parts if part in ("encoder", "decoder")), None)


def config_of(module: nn.Module) -> Mapping[str, Any] | None:
    """The configuration of a module as a mapping; None if the module has none, or if PEFT cannot convert it."""
    config = BaseTuner.get_model_config(module) if hasattr(module, "config") else None
    return config if isinstance(config, Mapping) else None


def _language_model(model: nn.Module, model_config: Mapping[str, Any]) -> str | None:
    """Name of the language model, or of its layers, in a model with towers; None for a model without towers."""
    parts = {name: part for name, part in model_config.items() if isinstance(part, Mapping)}
    if "text_config" in parts:
        return _decoder_in(model, model)
    # The towers are in one part of the model, and there are further parts, such as a vocoder.
    if any("text_config" in part for part in parts.values()):
        for module in model.modules():
            if module is not model and "text_config" in (config_of(module) or ()):
                return _decoder_in(model, module)
    if not any(key in part for part in parts.values() for key in DEPTH_KEYS):
        return None
    # Phi-4-multimodal: the model is the language model, and holds the towers.
    depth = count_layers(model_config, ())
    lists = [n for n, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return min(lists, key=lambda name: name.count("."), default=None)


def _decoder_in(model: nn.Module, part: nn.Module) -> str | None:
    """Name of the decoder in a part of a model; None if the part has no decoder or the decoder is the whole model."""
    get_decoder = getattr(part, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return next((name for name, module in model.named_modules() if name and module is decoder), None)

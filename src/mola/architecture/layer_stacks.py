"""In which layer a module is, and how many layers there are.

- `layer_index`, `count_layers`: position and depth from module names and the model's config.
- `LayerStacks`: the same for a whole model, also with an encoder below the decoder or towers beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

Names = list[str] | set[str] | str

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def layer_index(module_name: str) -> int | None:
    """Decoder layer of a module: the first dot-separated part of its name that is an integer.

    Args:
        module_name: as in `named_modules()`, e.g. "model.layers.3.mlp.experts.0.up_proj" -> 3.

    Returns:
        The layer, 0 = nearest the input; None for modules outside the layers.
    """
    for part in module_name.split("."):
        if re.fullmatch(r"[0-9]{1,5}", part):  # a longer number in a file is no layer
            return int(part)
    return None


def count_layers(model_config: Mapping[str, Any], module_names: Iterable[str]) -> int | None:
    """Number of decoder layers of a model.

    Args:
        model_config: a Transformers config as a dict; `num_hidden_layers`, `n_layer` or `num_layers` is
            read from it, else from its `text_config`.
        module_names: names of the model's modules; used when the config does not say.

    Returns:
        The depth; None if neither the config nor the names tell.
    """
    for section in (model_config, model_config.get("text_config")):
        if not isinstance(section, Mapping):
            continue
        for key in _DEPTH_KEYS:
            depth = section.get(key)
            if isinstance(depth, int) and not isinstance(depth, bool):
                return depth
    indices = [index for index in map(layer_index, module_names) if index is not None]
    return max(indices) + 1 if indices else None


@dataclass(frozen=True)
class LayerStacks:
    """The layers of a model that have a number of experts each, lowest first.

    - A decoder, or an encoder: its layers.
    - An encoder-decoder: the encoder's layers, then the decoder's. Each has a number of its own.
    - A language model beside towers for images or sound: the layers of the language model only.

    Attributes:
        num_layers: how many there are; None if nothing tells.
        num_encoder_layers: how many of them are in the encoder of an encoder-decoder; 0 for other models.
        language_model: name of the module that is the language model, or its layers, where there are towers beside it.
    """

    num_layers: int | None
    num_encoder_layers: int = 0
    language_model: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> LayerStacks:
        """Read the stacks off a model.

        Args:
            model: the model with its `config`, if it has one; weights are not read.
        """
        model_config = BaseTuner.get_model_config(model)
        names = [name for name, _ in model.named_modules()]
        if model_config.get("is_encoder_decoder"):
            encoder, decoder = (
                count_layers({}, (name for name in names if _side(name) == side)) for side in ("encoder", "decoder")
            )
            if encoder and decoder:
                return cls(encoder + decoder, num_encoder_layers=encoder)
        language_model = _language_model(model, model_config)
        return cls(count_layers(model_config, names), language_model=language_model)

    def index(self, module_name: str) -> int | None:
        """Layer of a module, 0 = nearest the input; None for modules outside the layers.

        Args:
            module_name: as in `named_modules()`.
        """
        if self.language_model is not None and not module_name.startswith(self.language_model + "."):
            return None
        index = layer_index(module_name)
        if index is not None and self.num_encoder_layers and _side(module_name) == "decoder":
            return self.num_encoder_layers + index
        return index

    def is_encoder(self, index: int | None) -> bool:
        """Whether a layer belongs to the encoder of an encoder-decoder."""
        return index is not None and index < self.num_encoder_layers

    def also_excluding_towers(self, exclude_modules: Names | None) -> Names | None:
        """`exclude_modules` that leave out what is beside the language model too; as given if nothing is.

        Args:
            exclude_modules: names, a regular expression, or None.
        """
        if self.language_model is None:
            return exclude_modules
        beside = rf"(?!{re.escape(self.language_model)}\.).*"
        if exclude_modules is None:
            return beside
        if not isinstance(exclude_modules, str):
            exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, sorted(exclude_modules)))})"
        return f"{beside}|{exclude_modules}"


def _side(module_name: str) -> str | None:
    """The part "encoder" or "decoder", whichever comes first in a name; None if neither does."""
    return next((part for part in module_name.split(".") if part in ("encoder", "decoder")), None)


def _language_model(model: nn.Module, model_config: Mapping[str, Any]) -> str | None:
    parts = {name: part for name, part in model_config.items() if isinstance(part, Mapping)}
    get_decoder = getattr(model, "get_decoder", None)
    if "text_config" in parts:
        decoder = get_decoder() if get_decoder is not None else None
        return next((name for name, module in model.named_modules() if name and module is decoder), None)
    if not any(key in part for part in parts.values() for key in _DEPTH_KEYS):
        return None
    # As Phi-4-multimodal: the model is the language model and holds the towers, too.
    depth = count_layers(model_config, ())
    lists = [n for n, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return min(lists, key=lambda name: name.count("."), default=None)

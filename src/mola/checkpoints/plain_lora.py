"""Plain LoRAs of PEFT: whether a folder holds one, and which layers it adapts. Needs no base model."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mola.architecture.layer_names import layer_index
from mola.checkpoints.adapter_settings import adapter_settings, is_published
from mola.errors import MolaError

_BEYOND_LORA = {
    "use_dora": "DoRA scales the base weight",
    "lora_bias": "its update has a bias",
    "target_parameters": "it adapts parameters that belong to no linear",
    "modules_to_save": "it has modules that are trained in full",
    "trainable_token_indices": "it has tokens that are trained in full",
    "layer_replication": "its layers are not the base model's layers",
    "alora_invocation_tokens": "it acts on some of the tokens only",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
        "it computes more than `B A x`",
    ),
}
# Other initialisations change the base weight when a LoRA is loaded.
_KEEP_BASE_WEIGHT = (True, False, "gaussian", "orthogonal", "eva")
_FACTOR = re.compile(r".*\.lora_(A|B)\.weight")


class PlainLora(NamedTuple):
    """What the tensors of a LoRA say.

    Attributes:
        rank: the largest rank of a module.
        layers: the adapted layers, 0 = nearest the input; a module outside the layers counts for none.
    """

    rank: int
    layers: list[int]


def parts_beyond_lora(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by which a LoRA is more than the update `scaling * B A x` of linears, and why.

    `settings` is the content of `adapter_config.json`.
    """
    reasons = {name: why for name, why in _BEYOND_LORA.items() if settings.get(name)}
    if settings.get("bias", "none") != "none":
        reasons["bias"] = "it has trained biases of the base model"
    if settings.get("init_lora_weights", True) not in _KEEP_BASE_WEIGHT:
        reasons["init_lora_weights"] = f"{settings['init_lora_weights']!r} changes the base weight"
    return reasons


def check_plain_lora(adapter: str | os.PathLike[str], what: str = "a skill") -> dict[str, Any]:
    """Check the settings of an adapter that must be a plain LoRA; reads no weights. `what` is its name in errors.

    Returns:
        The content of its `adapter_config.json`.

    Raises:
        MolaError: there is no adapter, or it is more than the update `scaling * B A x` of linears.
    """
    settings, folder = adapter_settings(adapter), str(adapter)
    peft_type = settings.get("peft_type")
    if peft_type != "LORA" or is_published(settings):
        cure = " `mola convert --to lora` makes a LoRA of a mixture." if peft_type == "MOLA" else ""
        numbers, pattern = settings.get("num_experts"), settings.get("num_experts_pattern") or {}
        if {*(numbers if isinstance(numbers, list) else [numbers]), *pattern.values()} == {1}:
            command = f"mola convert {shlex.quote(folder)} --to lora --output NEW_FOLDER"
            cure = f" It has one expert everywhere, so this command writes it as a LoRA: {command}"
        raise MolaError(f"{what} must be a LoRA of PEFT: {folder!r} has `peft_type` {peft_type!r}.{cure}")
    for name, why in parts_beyond_lora(settings).items():
        raise MolaError(f"{what} must be a plain LoRA: `{name}` is set in {folder!r}, and {why}. Train without it.")
    return settings


def describe_lora(shapes: Mapping[str, Sequence[int]], folder: Path) -> PlainLora:
    """What the names and shapes of a LoRA's tensors say; `folder` is for messages.

    Raises:
        MolaError: a tensor is no factor of a linear's update, such as those of adapted embeddings.
    """
    ranks, layers = [0], set()
    for name, shape in shapes.items():
        if name.endswith(".base_layer.weight"):  # PEFT also saves the frozen weight of an adapted head
            continue
        if not _FACTOR.fullmatch(name) or len(shape) != 2:
            raise MolaError(f"a skill must be a plain LoRA of linears: {str(folder)!r} has the tensor {name!r}.")
        ranks.append(min(shape))
        layer = layer_index(name)
        if layer is not None:
            layers.add(layer)
    return PlainLora(max(ranks), sorted(layers))

"""What the names of modules and tensors say: layer, depth, kind. Pure functions, no torch.

- `layer_index`, `count_layers`: layer and depth, from module names and the model's config.
- `module_kinds`: names that modules of all layers share.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "base_model.model."  # of names in a PeftModel
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def layer_index(module_name: str) -> int | None:
    """Decoder layer of a module, 0 = nearest the input; None for modules outside the layers.

    The layer is the first integer between dots in the name: 3 for "model.layers.3.mlp.experts.0.up_proj".
    """
    for part in module_name.split("."):
        if re.fullmatch(r"[0-9]{1,5}", part):  # a longer number is not a layer
            return int(part)
    return None


def count_layers(model_config: Mapping[str, Any], module_names: Iterable[str]) -> int | None:
    """Number of decoder layers of a model.

    Args:
        model_config: a Transformers config as a dict, with `num_hidden_layers`, `n_layer` or `num_layers` in it or in
            its `text_config`.
        module_names: names of the model's modules; used if the config has none of these keys.

    Returns:
        The depth; None if neither the config nor the names show it.
    """
    for section in (model_config, model_config.get("text_config")):
        if not isinstance(section, Mapping):
            continue
        for key in DEPTH_KEYS:
            depth = section.get(key)
            if isinstance(depth, int) and not isinstance(depth, bool):
                return depth
    indices = [index for index in map(layer_index, module_names) if index is not None]
    return max(indices) + 1 if indices else None


def module_kinds(module_names: Iterable[str]) -> dict[str, str]:
    """The kind of each module, which is the same in all layers: the last part of its name, such as `q_proj`.

    If two kinds end alike, like GPT-2's `attn.c_proj` and `mlp.c_proj`, all kinds are whole names below the layer.
    """
    names = list(module_names)
    below_layer = {name: _below_layer(name) for name in names}
    last_part = {kind: kind.rpartition(".")[2] for kind in below_layer.values()}
    is_unique = len(set(last_part.values())) == len(last_part)
    return {name: last_part[kind] if is_unique else kind for name, kind in below_layer.items()}


def _below_layer(name: str) -> str:
    parts, index = name.split("."), layer_index(name)
    return name if index is None else ".".join(parts[parts.index(str(index)) + 1 :]) or name

"""Reads adapters in the format of the paper's research code.

One folder with `adapter_config.json` (peft_type LORA, `r` a list) and `adapter_model.bin` or
`.safetensors`, whose keys name every expert separately:

    base_model.model.model.layers.N.MODULE.lora_A_e.weight     (r, in)
    base_model.model.model.layers.N.MODULE.lora_B_e.weight     (out, r)
    base_model.model.model.layers.N.MODULE.router.router.weight (E, in)

`num_experts` is counted from the keys. `top_k` is not saved there and has to be given. A layer with one
expert has a router there, which decides nothing, and none here.

- `read_published`: a folder to a `MolaConfig` and tensors.
- `read_tensors`: the weights of an adapter folder of either format.

The other direction is in `published_writer`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mola.errors import MolaError
from mola.tuner import MolaConfig
from mola.tuner.targets import layer_index

_KEY = re.compile(r"(?P<module>.+)\.(?:lora_(?P<part>[AB])_(?P<expert>\d+)|(?P<router>router)\.router)\.weight")

# Settings of the file that change what the tensors mean, with the values that `MolaConfig` is built for.
_NEUTRAL = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layers_to_transform": (None,),
    "modules_to_save": (None, []),
    "peft_type": ("LORA",),
}


def read_published(folder: str | Path, top_k: int | Sequence[int]) -> tuple[MolaConfig, dict[str, torch.Tensor]]:
    """Read an adapter of the research code.

    Args:
        folder: holds `adapter_config.json` and the weights.
        top_k: experts per token the adapter was trained with: one number or one per decoder layer.

    Returns:
        A configuration and a state dict in mola's layout, for `get_peft_model` and
        `set_peft_model_state_dict`.

    Raises:
        MolaError: a file is missing or unreadable, a key is not of this format, experts are not
            numbered without a gap, layers disagree about their number, or a setting has no counterpart.
    """
    folder = Path(folder)
    settings = _read_json(folder / "adapter_config.json")
    experts, routers = _group(read_tensors(folder))
    counts = _experts_per_layer(experts)
    state_dict = {}
    for module, parts in experts.items():
        state_dict[f"{module}.mola_A"] = torch.stack(parts["A"])
        state_dict[f"{module}.mola_B"] = torch.stack([b.t() for b in parts["B"]])
        if len(parts["A"]) > 1:  # the router of a layer with one expert decides nothing and is left out
            state_dict[f"{module}.mola_router"] = routers[module].float()
    config = MolaConfig(
        r=_list(settings, "r", folder),
        num_experts=counts,
        top_k=top_k if isinstance(top_k, int) else list(top_k),
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout", 0.0),
        target_modules=settings["target_modules"],
        task_type=settings.get("task_type"),
        base_model_name_or_path=settings.get("base_model_name_or_path"),
    )
    return config, state_dict


def _group(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, dict[str, list]], dict[str, torch.Tensor]]:
    """Sort tensors into experts per module and one router per module."""
    numbered: dict[str, dict[str, dict[int, torch.Tensor]]] = defaultdict(lambda: {"A": {}, "B": {}})
    routers = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise MolaError(f"{key!r} is no key of the research code's format; expected lora_A_0, lora_B_0 or router.")
        if match["router"]:
            routers[match["module"]] = tensor
        else:
            numbered[match["module"]][match["part"]][int(match["expert"])] = tensor
    experts = {}
    for module in routers:
        if module not in numbered:
            raise MolaError(f"{module!r} has a router and no experts. The file is incomplete.")
    for module, parts in numbered.items():
        router = routers.get(module)
        count = len(parts["A"])
        if set(parts["A"]) != set(range(count)) or set(parts["B"]) != set(range(count)):
            raise MolaError(
                f"{module!r} has experts A {sorted(parts['A'])} and B {sorted(parts['B'])}; both must be numbered "
                "from 0 without a gap. The file is incomplete."
            )
        if router is None or router.shape[0] != count:
            found = "no router" if router is None else f"a router for {router.shape[0]}"
            raise MolaError(f"{module!r} has {count} experts and {found}. The file is incomplete.")
        for part, numbers in parts.items():
            shapes = {tuple(tensor.shape) for tensor in numbers.values()}
            if len(shapes) > 1:
                raise MolaError(
                    f"{module!r} has experts {part} of different shapes {sorted(shapes)}; all experts of a module "
                    "must have one shape. The file is broken."
                )
        experts[module] = {part: [numbers[e] for e in range(count)] for part, numbers in parts.items()}
    return experts, routers


def _experts_per_layer(experts: dict[str, dict[str, list]]) -> list[int]:
    counts: dict[int, set[int]] = defaultdict(set)
    for module, parts in experts.items():
        index = layer_index(module)
        if index is None:
            raise MolaError(f"{module!r} lies in no decoder layer; the research code adapts decoder layers only.")
        counts[index].add(len(parts["A"]))
    uneven = {index: sorted(found) for index, found in counts.items() if len(found) > 1}
    missing = set(range(max(counts, default=-1) + 1)) - set(counts)
    if not counts or uneven or missing:
        raise MolaError(
            "Every decoder layer needs one number of experts: "
            + (f"different ones in layers {uneven}" if uneven else f"layers {sorted(missing)} have no tensors")
            + ". The file is incomplete."
        )
    return [counts[index].pop() for index in sorted(counts)]


def _list(settings: dict[str, Any], name: str, folder: Path) -> list[int]:
    if not isinstance(settings.get(name), list):
        raise MolaError(
            f"`{name}` in {folder / 'adapter_config.json'} must be a list with one number per layer, "
            f"got {settings.get(name)!r}. This is not an adapter of the research code."
        )
    return settings[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MolaError(f"{path} can not be read: {error}. Point to the folder of the saved adapter.") from error
    if not isinstance(settings, dict):
        raise MolaError(f"{path} must hold an object, got {settings!r}. Point to the folder of the saved adapter.")
    missing = [name for name in ("lora_alpha", "target_modules", "r") if name not in settings]
    if missing:
        raise MolaError(f"{path} lacks {missing}; this is not an adapter of the research code.")
    for name, allowed in _NEUTRAL.items():
        if name in settings and settings[name] not in allowed:
            raise MolaError(
                f"`{name}` in {path} must be {allowed[0]!r}, got {settings[name]!r}. "
                "No other adapters of the research code are supported."
            )
    return settings


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder, on the CPU; runs no code from the file.

    Raises:
        MolaError: no weights, two files of weights, or a file that is no flat dict of tensors.
    """
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        if (folder / name).is_file():
            break
    else:
        raise MolaError(f"{folder} holds neither adapter_model.bin nor adapter_model.safetensors.")
    both = (folder / "adapter_model.bin").is_file() and (folder / "adapter_model.safetensors").is_file()
    if both:
        raise MolaError(
            f"{folder} holds adapter_model.bin and adapter_model.safetensors, and they may differ. "
            "Remove the one that is out of date."
        )
    try:
        if name.endswith(".safetensors"):
            return load_file(folder / name)
        # weights_only: a pickle from elsewhere must not be able to run code.
        tensors = torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:
        raise MolaError(f"{folder / name} can not be read as tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise MolaError(f"{folder / name} must hold a flat dict of tensors, it does not.")
    return tensors

"""Reads adapters in the format of the paper's research code.

One folder with `adapter_config.json` (peft_type LORA, `r` a list) and `adapter_model.bin` or
`.safetensors`, whose keys name every expert separately:

    base_model.model.model.layers.N.MODULE.lora_A_e.weight     (r, in)
    base_model.model.model.layers.N.MODULE.lora_B_e.weight     (out, r)
    base_model.model.model.layers.N.MODULE.router.router.weight (E, in)

`num_experts` is counted from the keys. `top_k` is not saved there and has to be given. A layer with one
expert has a router there, which decides nothing, and none here.

The other direction is in `published_writer`.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mola.architecture.layer_stacks import layer_index
from mola.checkpoints.experts import ModuleExperts, group_experts
from mola.checkpoints.tensors import read_settings, read_tensors
from mola.errors import MolaError
from mola.tuner import MolaConfig
from mola.tuner.loading import PREFIX

_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])_(?P<expert>0|[1-9]\d{0,4})|(?P<router>router)\.router)\.weight"
)

# Settings of the file that change what the tensors mean, with the values that `MolaConfig` is built for.
_NEUTRAL = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layers_to_transform": (None,),
    "modules_to_save": (None, []),
    # Of later versions of PEFT: another scale, other ranks, other places.
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), (False, None)),
    **{name: ({}, None) for name in ("rank_pattern", "alpha_pattern")},
    **dict.fromkeys(("layer_replication", "target_parameters", "exclude_modules", "trainable_token_indices"), (None,)),
    "peft_type": ("LORA",),
}


def read_published(folder: str | Path, top_k: int | Sequence[int]) -> tuple[MolaConfig, dict[str, torch.Tensor]]:
    """Read an adapter of the research code.

    Args:
        folder: holds `adapter_config.json` and the weights.
        top_k: experts per token the adapter was trained with: one number or one per decoder layer.

    Returns:
        A configuration and a state dict in mola's layout, for `get_peft_model` and
        `set_peft_model_state_dict`. Ranks of layers that the model does not have, and names in `target_modules` that
        nothing in it has, which that code passes over, are left out.

    Raises:
        MolaError: a file is missing or unreadable, a key is not of this format, experts are not
            numbered without a gap, layers disagree about their number, or a setting has no counterpart.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    experts = group_experts(read_tensors(folder), _KEY, "the research code's format", "lora_A_0, lora_B_0 or router")
    counts = _experts_per_layer(experts)
    state_dict: dict[str, torch.Tensor] = {}
    for module, found in experts.items():
        name = f"{PREFIX}{module.removeprefix(PREFIX)}"  # which tools leave out that know nothing of PEFT
        if f"{name}.mola_A" in state_dict:
            raise MolaError(f"{folder} holds the experts of {module!r} twice, with and without {PREFIX!r} in front.")
        state_dict.update(found.stacked(name))
    if len(settings["r"]) < len(counts):
        raise MolaError(
            f"`r` in {folder / 'adapter_config.json'} must have one number per layer: {len(settings['r'])} numbers, "
            f"experts in {len(counts)} layers. The file is incomplete."
        )
    adapted, targets = {module.rpartition(".")[2] for module in experts}, settings["target_modules"]
    if isinstance(targets, list):
        targets = [name for name in targets if name in adapted]
    config = MolaConfig(
        r=settings["r"][: len(counts)],
        num_experts=counts,
        top_k=top_k if isinstance(top_k, int) else list(top_k),
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout", 0.0),
        target_modules=targets,
        task_type=settings.get("task_type"),
        base_model_name_or_path=settings.get("base_model_name_or_path"),
    )
    return config, state_dict


def _experts_per_layer(experts: dict[str, ModuleExperts]) -> list[int]:
    counts: dict[int, set[int]] = defaultdict(set)
    for module, found in experts.items():
        index = layer_index(module)
        if index is None:
            raise MolaError(f"{module!r} lies in no decoder layer; the research code adapts decoder layers only.")
        counts[index].add(found.num_experts)
    uneven = {index: sorted(numbers) for index, numbers in counts.items() if len(numbers) > 1}
    missing = set(range(len(counts))) - set(counts)
    if not counts or uneven or missing:
        raise MolaError(
            "Every decoder layer needs one number of experts: "
            + (f"different ones in layers {uneven}" if uneven else f"layers {sorted(missing)} have no tensors")
            + ". The file is incomplete."
        )
    return [counts[index].pop() for index in sorted(counts)]


def _read_settings(folder: Path) -> dict[str, Any]:
    settings, path = read_settings(folder), folder / "adapter_config.json"
    missing = [name for name in ("lora_alpha", "target_modules", "r") if name not in settings]
    if missing:
        raise MolaError(f"{path} lacks {missing}; this is not an adapter of the research code.")
    for name, allowed in _NEUTRAL.items():
        if name in settings and settings[name] not in allowed:
            raise MolaError(
                f"`{name}` in {path} must be {allowed[0]!r}, got {settings[name]!r}. "
                "No other adapters of the research code are supported."
            )
    if not isinstance(settings["r"], list):
        raise MolaError(
            f"`r` in {path} must be a list with one number per layer, got {settings['r']!r}. This is not an adapter of "
            "the research code."
        )
    targets = settings["target_modules"]
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MolaError(f"`target_modules` in {path} must be a text or a list of texts, got {targets!r}.")
    return settings

"""Reads and writes adapters in the format of the paper's research code.

One folder with `adapter_config.json` (peft_type LORA, `r` a list) and `adapter_model.bin` or
`.safetensors`, whose keys name every expert separately:

    base_model.model.model.layers.N.MODULE.lora_A_e.weight     (r, in)
    base_model.model.model.layers.N.MODULE.lora_B_e.weight     (out, r)
    base_model.model.model.layers.N.MODULE.router.router.weight (E, in)

- `num_experts` is not saved; it is counted from the keys.
- `top_k` is not saved; the user has to give it.
- A layer with one expert has a router, which has no effect. mola's format leaves the router out.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mola.architecture.layer_names import PREFIX, layer_index
from mola.architecture.notation import resolve_per_layer
from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.adapter_settings import read_settings
from mola.checkpoints.experts import ModuleExperts, group_experts
from mola.errors import MolaError
from mola.tuner import MolaConfig
from mola.tuner.routing import DEFAULT_ROUTER

_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])_(?P<expert>0|[1-9]\d{0,4})|(?P<router>router)\.router)\.weight"
)
# Settings that can change what the tensors mean -> the values with which they mean the same as in mola.
_NEUTRAL = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layers_to_transform": (None,),
    "modules_to_save": (None, []),
    # Settings of later versions of PEFT.
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), (False, None)),
    **{name: ({}, None) for name in ("rank_pattern", "alpha_pattern")},
    **dict.fromkeys(("layer_replication", "target_parameters", "exclude_modules", "trainable_token_indices"), (None,)),
    "peft_type": ("LORA",),
}


def read_published(folder: str | Path, top_k: int | Sequence[int]) -> tuple[MolaConfig, dict[str, torch.Tensor]]:
    """Read an adapter in the research code's format.

    Args:
        folder: holds `adapter_config.json` and the weights.
        top_k: experts per token the adapter was trained with: one number or one per decoder layer.

    Returns:
        A configuration and a state dict in mola's layout, for `get_peft_model` and
        `set_peft_model_state_dict`. Ranks of layers without tensors and names in `target_modules` without
        tensors are left out, as the research code ignores both.

    Raises:
        MolaError: a file is missing or unreadable, a key is not of this format, the experts'
            numbers have a gap, modules of a layer differ in their number of experts, or a setting has no counterpart.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    experts = group_experts(read_tensors(folder), _KEY, "the research code's format", "lora_A_0, lora_B_0 or router")
    counts = _count_experts_per_layer(experts)
    state_dict: dict[str, torch.Tensor] = {}
    for module, found in experts.items():
        name = f"{PREFIX}{module.removeprefix(PREFIX)}"  # some tools leave the prefix out
        if f"{name}.mola_A" in state_dict:
            raise MolaError(f"{folder} holds the experts of {module!r} twice, with and without {PREFIX!r} in front.")
        state_dict.update(found.stack(name))
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
    return settings


def _count_experts_per_layer(experts: dict[str, ModuleExperts]) -> list[int]:
    counts: dict[int, set[int]] = defaultdict(set)
    for module, found in experts.items():
        index = layer_index(module)
        if index is None:
            raise MolaError(f"{module!r} is in no decoder layer; the research code adapts decoder layers only.")
        counts[index].add(found.num_experts)
    uneven = {index: sorted(numbers) for index, numbers in counts.items() if len(numbers) > 1}
    missing = set(range(len(counts))) - set(counts)
    if not counts or uneven or missing:
        raise MolaError(
            "All modules of a decoder layer must have the same number of experts: "
            + (f"they differ in layers {uneven}" if uneven else f"layers {sorted(missing)} have no tensors")
            + ". The file is incomplete."
        )
    return [counts[index].pop() for index in sorted(counts)]


_DECODER_LINEAR = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
)
_MOLA_KEY = re.compile(r"(?P<module>.+)\.mola_(?P<part>A|B|router)")


def to_published(
    config: MolaConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Translate mola's adapter into the research code's format.

    The format cannot hold `top_k` and the settings of router losses; the caller has to keep them.

    Args:
        config: the adapter's configuration, as saved.
        tensors: the adapter's tensors, as saved: `MODULE.mola_A (E, r, in)`, `MODULE.mola_B (E, r, out)`,
            `MODULE.mola_router (E, in)` where `E > 1`.

    Returns:
        The content of `adapter_config.json`, and the flat dict of `adapter_model.bin`: float32, with a
        router of zeros, `(1, in)`, in layers with one expert.

    Raises:
        MolaError: the format cannot express the adapter, or `config` and `tensors` disagree.
    """
    _check_expressible(config)
    modules = _group_parts(tensors)
    num_layers, names = _same_in_every_layer(modules)
    targets = config.target_modules  # whole names if "all-linear" was resolved to a list
    plain = {} if isinstance(targets, str) else {name.rpartition(".")[2] for name in targets or ()}
    if targets != "all-linear" and plain != {*names}:
        raise MolaError(
            f"`target_modules` must be a list of the linears' plain names, {names}, got {config.target_modules!r}. "
            "The research code's format has no other way to choose modules; change it in adapter_config.json."
        )
    num_experts, ranks = (resolve_per_layer(getattr(config, n), num_layers, n) for n in ("num_experts", "r"))
    published = {}
    for module, parts in modules.items():
        layer = layer_index(module) or 0
        _check_parts(module, parts, num_experts[layer], ranks[layer])
        for expert in range(num_experts[layer]):
            published[f"{module}.lora_A_{expert}.weight"] = parts["A"][expert].float().clone()
            published[f"{module}.lora_B_{expert}.weight"] = parts["B"][expert].t().float().contiguous().clone()
        router = parts.get("router", torch.zeros(1, parts["A"].shape[-1]))
        published[f"{module}.router.router.weight"] = router.float().clone()
    alpha = config.lora_alpha
    settings = {
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": ranks,
        "revision": config.revision,
        "target_modules": names,
        "task_type": config.task_type,
    }
    return settings, published


def _check_expressible(config: MolaConfig) -> None:
    not_expressible = {
        "bias": config.bias not in ("none", None),
        "router": config.router != DEFAULT_ROUTER,
        "layers_to_transform": config.layers_to_transform is not None,  # 0 also chooses a layer
        **{
            name: bool(getattr(config, name))
            for name in (
                "modules_to_save",
                "exclude_modules",
                "target_parameters",
                "trainable_token_indices",
                "use_rslora",
                "num_experts_pattern",
                "rank_pattern",
                "alpha_pattern",
            )
        },
    }
    for name, is_set in not_expressible.items():
        if is_set:
            raise MolaError(
                f"`{name}` cannot be expressed in the research code's format, got {getattr(config, name)!r}. It has "
                "experts with linear routers in the same linears of every decoder layer, with one number of experts "
                "and one rank per layer, and the scale lora_alpha / r."
            )


def _group_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _MOLA_KEY.fullmatch(key)
        if match is None or not _DECODER_LINEAR.fullmatch(match["module"]):
            raise MolaError(
                f"{key!r} cannot be expressed in the research code's format: the format has experts and routers of "
                "the seven linears of LLaMA's decoder layers and nothing else."
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise MolaError(f"{key!r} is {tensor.dtype}; the research code's format is float32 and would lose digits.")
        modules[match["module"]][match["part"]] = tensor
    return modules


def _same_in_every_layer(modules: Iterable[str]) -> tuple[int, list[str]]:
    """Number of layers and the names of the linears, which must be the same in all layers."""
    by_layer: dict[int, set[str]] = defaultdict(set)
    for module in modules:
        by_layer[layer_index(module) or 0].add(module.rpartition(".")[2])
    layers = [by_layer.get(index, set()) for index in range(max(by_layer, default=0) + 1)]
    for index, names in enumerate(layers):
        if not names or names != layers[0]:
            raise MolaError(
                "The research code's format has the same linears in every decoder layer: layer 0 has "
                f"{sorted(layers[0])}, layer {index} has {sorted(names)}. This adapter cannot be expressed in it."
            )
    return len(layers), sorted(layers[0])


def _check_parts(module: str, parts: Mapping[str, torch.Tensor], num_experts: int, r: int) -> None:
    expected: dict[str, tuple[int, ...]] = {"A": (num_experts, r), "B": (num_experts, r)}
    if num_experts > 1:
        expected["router"] = (num_experts,)
    found = {part: tuple(tensor.shape[:-1]) for part, tensor in parts.items()}
    if found != expected:
        raise MolaError(
            f"{module!r} with `num_experts` {num_experts} and `r` {r} needs tensors of the shapes {expected} before "
            f"their features; the file has {found}. The file is incomplete, or adapter_config.json was changed."
        )
    if "router" in parts and parts["router"].shape[-1] != parts["A"].shape[-1]:
        raise MolaError(
            f"{module!r} has a router for {parts['router'].shape[-1]} features and experts for {parts['A'].shape[-1]}; "
            "both must read the same input. The file is broken."
        )

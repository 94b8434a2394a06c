"""Writes adapters in the format of the paper's research code, which `published` describes and reads."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mola.architecture.layer_stacks import layer_index
from mola.architecture.notation import resolve_per_layer
from mola.errors import MolaError
from mola.tuner import MolaConfig
from mola.tuner.routing import DEFAULT_ROUTER

_DECODER_LINEAR = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
)
_OWN_KEY = re.compile(r"(?P<module>.+)\.mola_(?P<part>A|B|router)")


def to_published(
    config: MolaConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter of mola in the research code's format.

    `top_k` and the router losses have no place there and are lost; the caller has to keep them.

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
    modules = _own_modules(tensors)
    num_layers, names = _same_in_every_layer(modules)
    targets = config.target_modules  # whole names, where "all-linear" was asked for
    plain = {} if isinstance(targets, str) else {name.rpartition(".")[2] for name in targets or ()}
    if targets != "all-linear" and plain != {*names}:
        raise MolaError(
            f"`target_modules` must be a list of the linears' plain names, {names}, got {config.target_modules!r}. "
            "The research code's format knows no other way to choose modules; change it in adapter_config.json."
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


_REASONS = {
    "use_rslora": "Its scale is lora_alpha / r: set `lora_alpha` to lora_alpha * sqrt(r), and this to false.",
    **dict.fromkeys(
        ("num_experts_pattern", "rank_pattern", "alpha_pattern"), "It has one number for all linears of a layer."
    ),
    "router": "It has linear routers only.",
}


def _check_expressible(config: MolaConfig) -> None:
    refused = {
        "bias": config.bias != "none" and config.bias,
        "router": config.router != DEFAULT_ROUTER,
        "modules_to_save": config.modules_to_save,
        # Layer 0 is a choice too.
        "layers_to_transform": None if config.layers_to_transform is None else [config.layers_to_transform],
        "exclude_modules": config.exclude_modules,
        "target_parameters": config.target_parameters,
        "use_rslora": config.use_rslora,
        "num_experts_pattern": config.num_experts_pattern,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "trainable_token_indices": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
    }
    for name, value in refused.items():
        if value:
            raise MolaError(
                f"`{name}` cannot be expressed in the research code's format, got {getattr(config, name)!r}. "
                f"{_REASONS.get(name, 'Only adapters of the same linears in every decoder layer can be written.')}"
            )


def _own_modules(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _OWN_KEY.fullmatch(key)
        if match is None or not _DECODER_LINEAR.fullmatch(match["module"]):
            raise MolaError(
                f"{key!r} cannot be expressed in the research code's format: it has experts and routers of the "
                "seven linears of LLaMA's decoder layers and nothing else."
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise MolaError(f"{key!r} is {tensor.dtype}; the research code's format is float32 and would lose digits.")
        modules[match["module"]][match["part"]] = tensor
    return modules


def _same_in_every_layer(modules: Iterable[str]) -> tuple[int, list[str]]:
    """Number of layers and the names of the linears, which have to be the same in all of them."""
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
    wanted = {"A", "B", "router"} if num_experts > 1 else {"A", "B"}
    if set(parts) != wanted:
        raise MolaError(
            f"{module!r} with `num_experts` {num_experts} needs the tensors {sorted(wanted)}, the file has "
            f"{sorted(parts)}. The file is incomplete, or adapter_config.json was changed."
        )
    for part, tensor in parts.items():
        leading = (num_experts,) if part == "router" else (num_experts, r)
        if tensor.dim() != len(leading) + 1 or tuple(tensor.shape[:-1]) != leading:
            raise MolaError(
                f"{module!r} has mola_{part} of shape {tuple(tensor.shape)}; `num_experts` {num_experts} and `r` {r} "
                f"need {(*leading, 'features')}. Was adapter_config.json changed?"
            )
    if "router" in parts and parts["router"].shape[-1] != parts["A"].shape[-1]:
        raise MolaError(
            f"{module!r} has a router for {parts['router'].shape[-1]} features and experts for {parts['A'].shape[-1]}; "
            "both take the same input. The file is broken."
        )

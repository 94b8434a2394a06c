"""Converts fields of axolotl's YAML to fields of `MolaConfig`, and refuses fields that a mixture cannot use.

This module does not import axolotl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mola.errors import MolaError
from mola.integrations.mixture_settings import FIELDS, checked_settings, is_mixture, raise_not_mergeable
from mola.tuner import MolaConfig

_MOLA_NAME_OF = {  # field of axolotl -> field of MolaConfig
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
}
_AXOLOTL_READS_TOO = ("lora_model_dir", "lora_target_linear", "peft_autocast_adapter_dtype")
_ADAPTER_PREFIXES = ("lora", "peft", "qlora", "relora", "mixlora", "mola_")  # prefixes of the fields about adapters
_QUANTISED = "axolotl quantises the base only for its own adapters; `mola train` quantises it for a mixture, too"
_SHARDED = "axolotl saves a sharded adapter by LoRA's names"
_UNTRIED = "only supervised fine-tuning has been tried"
_REFUSED = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "gptq", "bnb_config_kwargs"), _QUANTISED),
    **dict.fromkeys(("fsdp", "fsdp_config"), _SHARDED),
    **dict.fromkeys(("flash_attn_fuse_qkv", "flash_attn_fuse_mlp"), "it replaces the linears that get experts"),
    **dict.fromkeys(("rl", "reward_model", "process_reward_model", "use_ray", "orpo_alpha"), _UNTRIED),
}
_PARALLEL_SIZES = ("tensor_parallel_size", "expert_parallel_size", "context_parallel_size", "sequence_parallel_degree")


def check_merge(cfg: Mapping[str, Any]) -> None:
    """Raise if `axolotl merge-lora` is run on a mixture: axolotl would save the base model alone.

    Raises:
        MolaError: the adapter is a mixture.
    """
    folder = cfg.get("lora_model_dir") or cfg.get("output_dir")
    if cfg.get("merge_lora") and (cfg.get("adapter") == "mola" or is_mixture(folder)):
        raise_not_mergeable("`merge-lora`")


def check_inference(cfg: Mapping[str, Any]) -> None:
    """Raise if `axolotl inference` is run without an adapter: a new mixture would answer, which equals the base model.

    Raises:
        MolaError: the YAML, with `adapter: mola`, names no `lora_model_dir`.
    """
    if cfg.get("inference") and not cfg.get("lora_model_dir"):
        raise MolaError(
            "`adapter: mola` needs `lora_model_dir` for inference: pass `--lora-model-dir FOLDER`, the folder of the "
            f"trained adapter, such as `output_dir` ({cfg.get('output_dir')!r})."
        )


def given_settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `MolaConfig` that the YAML sets.

    Args:
        cfg: the YAML with `adapter: mola`.

    Raises:
        MolaError: a field that a mixture cannot use, or a wrong value.
    """
    block = cfg.get("mola") or {}
    unknown = sorted(set(block) - set(FIELDS)) if isinstance(block, Mapping) else [block]
    if unknown:
        raise MolaError(f"`mola` must be a block with settings among {', '.join(FIELDS)}: got {unknown}.")
    for name, value in cfg.items():
        why = _REFUSED.get(name, "a mixture does not use it" if str(name).startswith(_ADAPTER_PREFIXES) else None)
        if value and why and name not in (*_MOLA_NAME_OF, *_AXOLOTL_READS_TOO):
            raise MolaError(f"`{name}` must be left out with `adapter: mola`: got {value!r}, but {why}.")
        size = value.get("size") if name == "context_parallel" and isinstance(value, Mapping) else value
        if name in (*_PARALLEL_SIZES, "context_parallel") and size not in (None, 1):
            raise MolaError(f"`{name}` must be 1 with `adapter: mola`, {_SHARDED}: got {value!r}.")
    named = {ours: cfg.get(theirs) for theirs, ours in _MOLA_NAME_OF.items()}
    named |= {name: block.get(name) for name in FIELDS}
    if cfg.get("lora_target_linear"):
        if named["target_modules"] is not None:
            raise MolaError(
                f"`lora_target_linear` means all linears, `lora_target_modules` names {named['target_modules']!r}: "
                "leave one of the two out."
            )
        named["target_modules"] = "all-linear"
    return checked_settings(named)


def new_config(given: Mapping[str, Any]) -> MolaConfig:
    """The configuration of a new mixture."""
    return MolaConfig(**given, task_type="CAUSAL_LM")

"""Tells from `adapter_config.json` alone which program wrote an adapter."""

import shlex
from collections.abc import Mapping
from typing import Any

# MoE-PEFT writes nothing else; PEFT, and so mola, always writes more.
_ALWAYS = {
    *("peft_type", "num_experts", "top_k", "r", "lora_alpha", "lora_dropout", "bias"),
    *("target_modules", "base_model_name_or_path", "task_type"),
}
_SOMETIMES = {"use_dora", "use_rslora"}


def foreign_format(settings: Mapping[str, Any]) -> str | None:
    """The format of an adapter that PEFT cannot load, by its `adapter_config.json`, as `mola convert --from` names it.

    Returns:
        "published" (`r` is a list in an adapter that calls itself LORA), "moe_peft" (MoE-PEFT calls its
        method MOLA too, with other files), or None for everything else.
    """
    peft_type = settings.get("peft_type")
    if peft_type == "LORA" and isinstance(settings.get("r"), list):
        return "published"
    # The first versions of MoE-PEFT did not write `routing_strategy` for this method.
    is_earlier = _ALWAYS <= settings.keys() <= _ALWAYS | _SOMETIMES
    if peft_type == "MOLA" and ("routing_strategy" in settings or is_earlier):
        return "moe_peft"
    return None


def conversion_hint(settings: Mapping[str, Any], folder: str) -> str | None:
    """What to do with an adapter that has to be converted first; None for all others."""
    found = foreign_format(settings)
    if found is None:
        return None
    name, top_k = {
        "published": ("of the paper's research code", " --top_k K (that of its training)"),
        "moe_peft": ("of MoE-PEFT", ""),
    }[found]
    return (
        f"{folder!r} is an adapter {name}, which must be converted first: "
        f"mola convert {shlex.quote(folder)} --from {found} --base_model MODEL --output NEW_FOLDER{top_k}"
    )

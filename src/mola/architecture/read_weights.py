"""Linears whose weight a model reads, in one kernel with others, instead of calling them: no expert is computed there.

Most are of Mamba-like mixers. Some are called on CPUs and read on GPUs, so that an adapter would be another one there.
"""

from typing import Any

from torch import nn

_ALL = ("x_proj", "dt_proj", "out_proj")
_READ = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), _ALL),
    **dict.fromkeys(("mamba2", "falcon_h1", "bamba", "zamba2", "nemotron_h", "granitemoehybrid"), ("out_proj",)),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "reformer": ("query_key", "value"),  # where it goes on from a cache
    "longcat_flash": ("classifier",),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), ("correction_coefs",)),  # while training
    "mobilebert": ("predictions.dense",),
    **dict.fromkeys(("detr", "conditional_detr"), ("bbox_attention.k_proj",)),
    "neomme": ("unembedding_projection",),
}
_ENDS = {end for ends in _READ.values() for end in ends}


def is_read_in(model_type: str | None, name: str) -> bool:
    """Whether a module of this name, as in `named_modules()`, is one of them in models of this type."""
    return any(f".{name}".endswith(f".{end}") for end in _READ.get(model_type or "", ()))


def is_read(model: nn.Module, name: str) -> bool:
    """Whether a model, or one that it is made of, reads the weight of the module of this name."""
    if not any(name.endswith(end) for end in _ENDS):
        return False
    module: Any = model
    for part in ("", *name.split(".")):
        module = getattr(module, part) if part else module
        if is_read_in(getattr(getattr(module, "config", None), "model_type", None), name):
            return True
    return False

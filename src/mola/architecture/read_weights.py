"""Linears whose weight a model reads, in one kernel with others, instead of calling them: no expert is computed there.

Those of Mamba-like mixers. Some are called on CPUs and read on GPUs, so that an adapter would be another one there.
"""

_ALL = ("x_proj", "dt_proj", "out_proj")
_READ = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), _ALL),
    **dict.fromkeys(("mamba2", "falcon_h1", "bamba", "zamba2", "nemotron_h", "granitemoehybrid"), ("out_proj",)),
}


def is_read(model_type: str | None, name: str) -> bool:
    """Whether a module of this name, as in `named_modules()`, is one of them in models of this type."""
    return name.rpartition(".")[2] in _READ.get(model_type or "", ())

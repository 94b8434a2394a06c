"""What modules of all layers have in common."""

from collections.abc import Iterable

from mola.architecture.layer_stacks import layer_index


def kinds_of(modules: Iterable[str]) -> dict[str, str]:
    """The kind of each module: `q_proj`, or more of its name where that alone would be of two, as GPT-2's `c_proj`."""
    names = list(modules)
    inside = {name: _after_layer(name) for name in names}
    last = {kind: kind.rpartition(".")[2] for kind in inside.values()}
    is_clear = len(set(last.values())) == len(last)
    return {name: last[kind] if is_clear else kind for name, kind in inside.items()}


def _after_layer(name: str) -> str:
    parts, index = name.split("."), layer_index(name)
    return name if index is None else ".".join(parts[parts.index(str(index)) + 1 :]) or name

"""Content of a saved adapter: experts and trainable parameters of each layer, and how alike the experts are."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mola.architecture.layer_names import PREFIX, layer_index
from mola.architecture.notation import resolve_per_layer
from mola.architecture.patterns import scaling_of
from mola.checkpoints.adapter_folder import read_arrays
from mola.checkpoints.adapter_settings import read_settings
from mola.files.digests import find_weights
from mola.insight.saved_redundancy import ModuleRedundancy, redundancy_of_arrays
from mola.reporting.document import Table
from mola.reporting.formatting import layer_order, layer_range

_MAX_SHOWN_ENTRIES = 8  # entries of a pattern shown in a sentence
_STACKED = re.compile(r"\.mola_[AB]_\w+$")  # the weights of one parameter of `target_parameters`


@dataclass(frozen=True)
class LayerExperts:
    """One decoder layer of an adapter; its modules have the same settings unless a pattern changes some of them."""

    layer_index: int | None  # number of the layer; None for modules outside the layers
    num_experts: int  # experts of each module for which no pattern sets a number
    fewest: int  # smallest number of experts of a module
    most: int  # largest number of experts of a module
    top_k: int  # experts chosen for a token
    r: int  # rank of each expert
    expert_values: int  # trainable parameters of the experts of all modules
    router_values: int  # trainable parameters of their routers

    @property
    def experts_text(self) -> str:
        """Experts of each module: `4`, or `2–8` if modules differ."""
        return str(self.most) if self.fewest == self.most else f"{self.fewest}–{self.most}"


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter on disk."""

    config: Mapping[str, Any]  # its `adapter_config.json`
    layers: Sequence[LayerExperts]  # its layers, lowest first; empty for an adapter of a different method
    redundancy: Sequence[ModuleRedundancy]  # how alike the experts are, for every module with several experts


def read_adapter_weights(folder: Path) -> AdapterWeights | None:
    """Read the adapter in a run folder; None if the folder has no configuration or no weights.

    Raises:
        MolaError: a file cannot be read, was damaged since it was saved, or holds values that are not finite.
    """
    if find_weights(folder) is None or not (folder / "adapter_config.json").exists():
        return None
    config = read_settings(folder)
    if config.get("peft_type") != "MOLA":
        return AdapterWeights(config, [], [])
    tensors = read_arrays(folder)
    redundancy = []
    for name in sorted(tensors, key=lambda name: (layer_order(layer_index(name)), name)):
        if name.endswith("mola_A") and len(tensors[name]) > 1:
            module = name.removesuffix(".mola_A")
            experts_A, experts_B = tensors[name], tensors[f"{module}.mola_B"]
            scaling = scaling_of(config, module.removeprefix(PREFIX), experts_A.shape[1])
            redundancy.append(redundancy_of_arrays(module, layer_index(name), experts_A, experts_B, scaling))
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return AdapterWeights(config, layers_of(config, shapes), redundancy)


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, without reading their values."""
    with safe_open(path, "np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def layers_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[LayerExperts]:
    """The layers of an adapter, lowest first, from its configuration and the shapes of its tensors."""
    num_experts: dict[int | None, int] = {}
    of_modules: dict[int | None, list[int]] = defaultdict(list)
    values: dict[int | None, list[int]] = defaultdict(lambda: [0, 0])  # number of parameters of experts and of routers
    for name, shape in shapes.items():
        if "mola_" not in name:  # such as a trained embedding
            continue
        layer = layer_index(name)
        # The first dimension of stacked parameters is the number of the base model's own experts.
        number = 1 if _STACKED.search(name) else _setting(config, "num_experts", layer)
        num_experts[layer] = max(number, num_experts.get(layer, 0))
        values[layer]["mola_router" in name] += math.prod(shape)
        if name.endswith("mola_A"):
            of_modules[layer].append(shape[0])
    layers = []
    for layer in sorted(values, key=layer_order):
        fewest = min(of_modules[layer], default=num_experts[layer])
        most = max(of_modules[layer], default=num_experts[layer])
        top_k = min(_setting(config, "top_k", layer), most)
        r = _setting(config, "r", layer)
        layers.append(LayerExperts(layer, num_experts[layer], fewest, most, top_k, r, *values[layer]))
    return layers


def _setting(config: Mapping[str, Any], name: str, layer: int | None) -> int:
    """A setting of one layer; the configuration has one number for all layers, or a list with one number for each."""
    setting, index = config[name], layer or 0
    num_layers = max(index + 1, len(setting) if isinstance(setting, list) else 0)
    return resolve_per_layer(setting, num_layers, name)[index]


def target_names(config: Mapping[str, Any]) -> list[str]:
    """The adapted modules and parameters that a configuration names, or its regular expression."""
    modules = config.get("target_modules") or []
    names = [modules] if isinstance(modules, str) else sorted(modules)
    return [*names, *(config.get("target_parameters") or [])]


def pattern_sentence(config: Mapping[str, Any]) -> str:
    """A sentence on modules with settings of their own, with a leading space; empty if there are none."""
    patterns = {name: config.get(name) for name in ("num_experts_pattern", "rank_pattern", "alpha_pattern")}
    parts = [
        # An allocation per module names most modules.
        f"`{name}` " + (f"`{entries}`" if len(entries) <= _MAX_SHOWN_ENTRIES else f"with {len(entries)} entries")
        for name, entries in patterns.items()
        if entries
    ]
    return f" Some modules have settings of their own: {', '.join(parts)}." if parts else ""


def layers_table(rows: Sequence[LayerExperts]) -> Table:
    """One line for each range of equal layers, and one for modules outside the layers."""

    def settings_of(position_and_row: tuple[int, LayerExperts]) -> tuple[Any, ...]:
        position, row = position_and_row
        values = f"{row.expert_values:,}", f"{row.router_values:,}"
        # Consecutive layers have the same difference of index and position. A layer without adapter has no row, so it
        # ends a range.
        return (row.layer_index or 0) - position, row.experts_text, f"{row.top_k:,}", f"{row.r:,}", *values

    lines = []
    for (_, *settings), members in groupby(enumerate(rows), key=settings_of):
        lines.append((layer_range([row.layer_index for _, row in members]), *settings))
    head = ("layers", "experts", "top_k", "r", "values of experts", "values of routers")
    return Table(head, lines, "Experts by layer; each figure is for one layer")

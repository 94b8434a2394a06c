"""What the saved adapter says by itself: values by layer, and how alike its experts are."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mola.architecture.layer_stacks import layer_index
from mola.architecture.notation import resolve_per_layer
from mola.architecture.patterns import scaling_of
from mola.checkpoints.adapter_folder import read_tensors
from mola.errors import MolaError
from mola.files.digests import check_digest, check_finite, find_weights
from mola.files.reading import read_json_object
from mola.files.schema import TEXT, check_form
from mola.insight.inspection import ModuleRedundancy, module_redundancy
from mola.reporting.formatting import layer_order
from mola.reporting.schema import PER_LAYER
from mola.tuner.loading import PREFIX

_MOST_NAMED = 8  # entries of a pattern that a sentence can hold
_STACKED = re.compile(r"\.mola_([AB])_\w+$")


@dataclass(frozen=True)
class LayerExperts:
    """One decoder layer of an adapter; its modules have the same settings, unless `own_numbers` says otherwise."""

    layer_index: int | None  # the layer
    num_experts: int  # experts of each module; the layer's own number, if some modules have others
    fewest: int  # experts of the module that has fewest
    most: int  # and of that which has most
    top_k: int  # of them chosen for a token
    r: int  # rank of each
    expert_values: int  # trained values of the experts of all modules
    router_values: int  # trained values of their routers

    @property
    def experts_said(self) -> str:
        """Experts of each module in words: `4`, or `2–8` where modules differ."""
        return str(self.most) if self.fewest == self.most else f"{self.fewest}–{self.most}"


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter on disk."""

    config: Mapping[str, Any]  # its `adapter_config.json`
    layers: Sequence[LayerExperts]  # its layers, lowest first; empty for an adapter of another method
    redundancy: Sequence[ModuleRedundancy]  # likeness of the experts of every module that has several


def read_adapter_weights(folder: Path) -> AdapterWeights | None:
    """Read the adapter in a run folder, one module at a time; None if there is none."""
    config, path = read_json_object(folder / "adapter_config.json"), find_weights(folder)
    if path is None or not (folder / "adapter_config.json").exists():
        return None
    if not config:
        raise MolaError(f"{str(folder / 'adapter_config.json')!r} cannot be read. Restore the file, or train again.")
    if config.get("peft_type") != "MOLA":
        return AdapterWeights(config, [], [])
    names = {"target_parameters?": ([TEXT], None)}
    if not isinstance(config.get("target_modules"), str):
        names["target_modules?"] = ([TEXT], None)
    for form in (PER_LAYER, names):
        check_form(config, form, str(folder / "adapter_config.json"), "Restore the file.")
    check_digest(folder)
    redundancy = []
    with opened(path) as file:
        shapes = shapes_in(file)
        dtypes = {file.get_slice(name).get_dtype() for name in shapes}
        if not dtypes <= {"F64", "F32", "F16", "BF16"}:
            raise MolaError(f"{str(path)!r} must hold floating-point numbers: got {sorted(dtypes)}. Restore the file.")
        _check_shapes(shapes, path)
        for name in sorted(shapes, key=_place):
            if name.endswith("mola_A") and shapes[name][0] > 1:
                redundancy.append(_redundancy(file, path, name, config))
    return AdapterWeights(config, layers_of(config, shapes), redundancy)


def layers_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[LayerExperts]:
    """The layers of an adapter, lowest first, from its configuration and the shapes of its tensors."""
    own: dict[int | None, int] = {}
    modules: dict[int | None, list[int]] = defaultdict(list)
    for name, shape in shapes.items():
        # Those of `target_parameters` count the base model's experts.
        layer, is_stacked = layer_index(name), _STACKED.search(name) is not None
        own[layer] = max(1 if is_stacked else of_layer(config, "num_experts", layer), own.get(layer, 0))
        if name.endswith("mola_A"):
            modules[layer].append(shape[0])
    found = []
    for layer, values in sorted(values_by_layer(shapes).items(), key=lambda item: layer_order(item[0])):
        fewest, most = min(modules[layer], default=own[layer]), max(modules[layer], default=own[layer])
        top_k, r = (of_layer(config, name, layer) for name in ("top_k", "r"))
        found.append(LayerExperts(layer, own[layer], fewest, most, min(top_k, most), r, *values))
    return found


def _redundancy(file: Any, path: Path, name: str, config: Mapping[str, Any]) -> ModuleRedundancy:
    module, layer = name.removesuffix(".mola_A"), layer_index(name)
    experts_A, experts_B = file.get_tensor(name), file.get_tensor(f"{module}.mola_B")
    check_finite({name: experts_A, f"{module}.mola_B": experts_B}, repr(str(path)))
    scaling = scaling_of(config, module.removeprefix(PREFIX), experts_A.shape[1])
    return module_redundancy(module, layer, experts_A, experts_B, scaling)


def own_numbers(config: Mapping[str, Any]) -> str:
    """A sentence about modules with numbers of their own, in front of it a space; empty if there are none."""
    names = ("num_experts_pattern", "rank_pattern", "alpha_pattern")
    given = {name: config[name] for name in names if config.get(name)}
    # An allocation per module names most of them.
    found = [f"`{name}` {f'`{v}`' if len(v) <= _MOST_NAMED else f'with {len(v)} entries'}" for name, v in given.items()]
    return f" Some modules have numbers of their own: {', '.join(found)}." if found else ""


def shapes_in(file: Any) -> dict[str, list[int]]:
    """Shapes of the experts and routers in a file of tensors."""
    return {name: file.get_slice(name).get_shape() for name in file.keys() if "mola_" in name}  # noqa: SIM118


def values_by_layer(shapes: Mapping[str, Sequence[int]]) -> dict[int | None, list[int]]:
    """Number of values of the experts, and of the routers, of each layer."""
    values: dict[int | None, list[int]] = defaultdict(lambda: [0, 0])
    for name, shape in shapes.items():
        values[layer_index(name)]["mola_router" in name] += math.prod(shape)
    return values


def of_layer(config: Mapping[str, Any], name: str, layer: int | None) -> int:
    """A setting of one layer, where a configuration has one number for all layers, or one for each."""
    setting, index = config[name], layer or 0
    num_layers = max(index + 1, len(setting) if isinstance(setting, list) else 0)
    return resolve_per_layer(setting, num_layers, name)[index]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of tensors, read one by one; an unreadable one is refused."""
    try:
        with ExitStack() as stack:
            readable = stack.enter_context(_copied(path)) if path.suffix == ".bin" else path
            yield stack.enter_context(safe_open(readable, "pt"))
    except (OSError, SafetensorError) as error:
        raise MolaError(f"{str(path)!r} cannot be read: {error}. Restore the file, or train again.") from error


@contextmanager
def _copied(path: Path) -> Iterator[Path]:
    """A temporary copy that can be read one by one of a file that can be read as a whole only."""
    tensors = read_tensors(path.parent)
    with ExitStack() as stack:
        try:
            copied = Path(stack.enter_context(TemporaryDirectory())) / "adapter_model.safetensors"
            save_file(tensors, copied)
        except (OSError, SafetensorError) as error:
            raise MolaError(
                f"a temporary copy of {str(path)!r} cannot be written: {error}. Free some space, or set TMPDIR to a "
                "larger folder."
            ) from error
        yield copied


def _check_shapes(shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    """A is `(E, r, in)`, B `(E, r, out)`, the router `(E, in)`."""
    for name, shape in shapes.items():
        part = _STACKED.sub(r".mola_\1", name).rpartition("mola_")[2]
        valid = len(shape) == (2 if part == "router" else 3) and all(shape) and part in ("A", "B", "router")
        if part == "A":
            other = shapes.get("mola_B".join(name.rsplit("mola_A", 1)), [])
            valid = valid and list(other[:2]) == list(shape[:2])
        if not valid:
            raise MolaError(
                f"{str(path)!r} must hold experts as mola writes them: {name!r} has shape {list(shape)}, or lacks its "
                "counterpart. Restore the file, or train again."
            )


def _place(name: str) -> tuple[float, str]:
    return layer_order(layer_index(name)), name

"""Reads the base model of an allocation: its depth, its linears and, one matrix at a time, their weights."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from mola.architecture.allocation import LinearShape, plan_allocation
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.targets import linear_shapes, resolve_target_modules
from mola.errors import MolaError
from mola.models.base_model import load_config
from mola.models.loading import load_model
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.models.quantization import Quantization, stored_quantization
from mola.options.fields import split_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """What an allocation needs to know of a model."""

    name: str  # folder or hub id
    num_layers: int  # decoder layers
    linears: tuple[LinearShape, ...]  # the linears to adapt; empty if a probe determines them
    layer_of: Mapping[str, int | None]  # name of any module -> its layer, None outside the layers
    trust_remote_code: bool = False  # run code shipped with the model
    gguf_file: str | None = None  # GGUF file in the folder; None for a model in other formats

    @property
    def is_adapted(self) -> list[bool]:
        """For every layer, whether it has a linear to adapt."""
        adapted = {linear.layer_index for linear in self.linears}
        return [index in adapted for index in range(self.num_layers)]


def read_base(
    base_model: str,
    target_modules: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    *,
    has_probe: bool = False,
) -> Base:
    """Read a model's depth and the linears to adapt, chosen as in `mola train`; loads no weights.

    With `has_probe` the linears are left out: the probe determines them, and some architectures have no default.

    Raises:
        MolaError: the model has no readable configuration, or `target_modules` does not fit it.
    """
    load_config(base_model, trust_remote_code, gguf_file)
    model = model_on_meta(base_model, trust_remote_code, gguf_file)
    num_layers = count_decoder_layers(model, base_model)
    stacks = LayerStacks.of(model)
    linears: list[LinearShape] = []
    if not has_probe:
        targets = resolve_target_modules(model, stacks, split_names(target_modules))
        linears = linear_shapes(model, *targets)
        ones = [1] * num_layers
        plan_allocation(linears, ones, ones, ones)  # raises for linears outside the layers
    layer_of = {name: stacks.index(name) for name, _ in model.named_modules()}
    return Base(base_model, num_layers, tuple(linears), layer_of, trust_remote_code, gguf_file)


def iterate_weights(base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight of every linear to adapt, in the order of the model.

    The weights are read from the safetensors files, so that one matrix is in memory at a time. If the files name
    the weights differently than the model (GGUF, other formats, architectures that Transformers converts while
    loading), the whole model is loaded in float32, and a log line says so.

    Raises:
        MolaError: the weights are missing or quantised.
    """
    config = load_config(base.name, base.trust_remote_code, base.gguf_file)
    if base.gguf_file is None and stored_quantization(config) is not None:
        raise MolaError(
            f"`base_model` must have plain weights for alphalora: the weights of {base.name!r} are quantised. Pass "
            "the model that they were quantised from: its allocation also fits the quantised model."
        )
    files = {} if base.gguf_file is not None else _files_of(base)
    if files:
        for linear in base.linears:
            path, key = files[linear.name]
            with safe_open(path, framework="pt") as file:
                yield linear.name, file.get_tensor(key)
        return
    logger.info("The files of %s name the weights differently than the model: the whole model is loaded.", base.name)
    model = load_model(
        base.name,
        dtype="float32",  # so that a score does not depend on the machine's default dtype
        device="cpu",
        trust_remote_code=base.trust_remote_code,
        quantization=Quantization(gguf_file=base.gguf_file),
    )
    for linear in base.linears:
        yield linear.name, model.get_parameter(f"{linear.name}.weight")


def _files_of(base: Base) -> dict[str, tuple[Path, str]]:
    """Each linear's weight file and its key there; empty if a file names a weight differently from the model."""
    file_of: dict[str, Path] = {}
    for path in _safetensors_files(base.name):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)
    # Files that were saved without the model's head lack a prefix, for example "transformer." in GPT-2.
    prefixes = ("", *{f"{linear.name.partition('.')[0]}." for linear in base.linears})
    for prefix in prefixes:
        keys = {linear.name: f"{linear.name.removeprefix(prefix)}.weight" for linear in base.linears}
        if all(key in file_of for key in keys.values()):
            return {name: (file_of[key], key) for name, key in keys.items()}
    return {}


def _safetensors_files(name: str) -> list[Path]:
    """The safetensors files in a folder, or downloaded from a model on the hub; empty if there are none."""
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    return_none_if_missing = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    single = cached_file(name, SAFE_WEIGHTS_NAME, **return_none_if_missing)
    if single is not None:
        return [Path(single)]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **return_none_if_missing)
    if index is None:
        return []
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    found = [cached_file(name, shard, **return_none_if_missing) for shard in shards]
    return [Path(path) for path in found if path is not None]

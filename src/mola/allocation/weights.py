"""The weight matrices of a base model, one at a time."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from mola.allocation.base import Base
from mola.errors import MolaError
from mola.models.base_model import load_config
from mola.models.loading import load_model
from mola.models.quantization import Quantization, stored_quantization

logger = logging.getLogger(__name__)


def weights_of(base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight of every linear to adapt, in the order of the model.

    Read from the safetensors files, so that one matrix is in memory at a time. Where the files do not hold them under
    their names in the model (GGUF, other formats, architectures that Transformers converts while loading) the model is
    loaded, in float32, which is said.

    Raises:
        MolaError: the weights are missing or quantised, found before the first one is read.
    """
    config = load_config(base.name, base.trust_remote_code, base.gguf_file)
    if base.gguf_file is None and stored_quantization(config) is not None:
        raise MolaError(
            f"`base_model` must have plain weights for alphalora: those of {base.name!r} are quantised. Pass the model "
            "that they were made of; the allocation holds for both."
        )
    files = {} if base.gguf_file is not None else _files_of(base)
    if files:
        return _from_files(base, files)
    logger.info("The weights of %s have other names in its files: the whole model is loaded.", base.name)
    return _from_model(base)


def _from_files(base: Base, files: dict[str, tuple[Path, str]]) -> Iterator[tuple[str, torch.Tensor]]:
    for linear in base.linears:
        path, key = files[linear.name]
        with safe_open(path, framework="pt") as file:
            yield linear.name, file.get_tensor(key)


def _from_model(base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    # float32, so that a score does not depend on the dtype that suits the machine.
    model = load_model(
        base.name,
        dtype="float32",
        device="cpu",
        trust_remote_code=base.trust_remote_code,
        quantization=Quantization(gguf_file=base.gguf_file),
    )
    for linear in base.linears:
        yield linear.name, model.get_parameter(f"{linear.name}.weight")


def _files_of(base: Base) -> dict[str, tuple[Path, str]]:
    """File and key of every linear's weight; empty if they are not all there under the model's own names."""
    places: dict[str, Path] = {}
    for path in _safetensors(base.name):
        try:
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise MolaError(
                f"`base_model` has weights that cannot be read: {str(path)!r}: {error}. Copy it again."
            ) from error
    # Files of a model without its head lack the prefix, such as GPT-2's "transformer.".
    prefixes = ("", *{f"{linear.name.partition('.')[0]}." for linear in base.linears})
    for prefix in prefixes:
        keys = {linear.name: f"{linear.name.removeprefix(prefix)}.weight" for linear in base.linears}
        if all(key in places for key in keys.values()):
            return {name: (places[key], key) for name, key in keys.items()}
    return {}


def _safetensors(name: str) -> list[Path]:
    """The safetensors files of a folder or of a model on the hub, whose files are downloaded; none if it has none."""
    quietly = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    single = cached_file(name, SAFE_WEIGHTS_NAME, **quietly)
    if single is not None:
        return [Path(single)]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **quietly)
    if index is None:
        return []
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    found = [cached_file(name, shard, **quietly) for shard in shards]
    return [Path(path) for path in found if path is not None]

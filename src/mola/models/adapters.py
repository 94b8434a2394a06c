"""Checks and loads adapters: what a folder must hold, and whether all of its tensors fit the model.

Adapters of any PEFT method load, not only mola's.
"""

import copy
import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from torch import nn

from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.adapter_settings import adapter_settings, conversion_hint
from mola.checkpoints.recorded_base import is_recorded_base
from mola.errors import MolaError
from mola.files.failures import memory_error_reason
from mola.tuner import MolaConfig  # this registers the method with PEFT
from mola.tuner.loading import check_adapter_tensors
from mola.tuner.router_losses import RouterLosses

logger = logging.getLogger(__name__)

_SHARED = "vblora_vector_bank"  # VB-LoRA has one tensor for all layers and saves it once


def check_adapter(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the configuration of an adapter folder, and check that its weights can be read.

    Returns:
        The content of its `adapter_config.json`.

    Raises:
        MolaError: no such folder, its `adapter_config.json` or weights are missing, unreadable or damaged, or the
            adapter is in a format that `mola convert` has to translate first.
    """
    folder = Path(adapter)
    config = adapter_settings(folder)
    if conversion := conversion_hint(config, str(folder)):
        raise MolaError(f"`adapter` must be in PEFT's format: {conversion}")
    if str(config.get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise MolaError(
            f"`adapter` must be of a method that the installed PEFT knows: {str(folder)!r} has `peft_type` "
            f"{config.get('peft_type')!r}. Update PEFT, or install the package that brings this method."
        )
    read_tensors(folder)  # finds damaged weights before a base model is loaded
    return config


def check_fits(model_on_meta: Any, config: MolaConfig, tensors: Mapping[str, torch.Tensor]) -> PeftModel:
    """Check that a mixture fits a model; needs no weights of the model.

    Args:
        model_on_meta: the base model on the meta device; the experts are put into it.
        config: the adapter's configuration; stays unchanged.
        tensors: name in the adapter's file -> tensor; only shapes and finiteness are checked.

    Returns:
        The model with the experts, without weights.

    Raises:
        MolaError: the model is of a different kind, or a tensor is missing or unknown, or has a different shape or
            values that are not finite.
    """
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # the model has no name, and PEFT would warn of the difference
    try:
        with torch.device("meta"):
            adapted: Any = get_peft_model(model_on_meta, config)
    except MolaError:
        raise
    except Exception as error:  # PEFT does not validate the configuration
        raise MolaError(f"the adapter's configuration cannot be put into the base model: {error}") from error
    check_adapter_tensors(adapted, "default", {f"{key}.default": value for key, value in tensors.items()})
    return adapted


def check_lora(folder: Path, model_on_meta: nn.Module, *, all_names: bool = True) -> dict[str, torch.Tensor]:
    """Check that a LoRA of PEFT fits a model; puts the LoRA into the model, whose weights it does not need.

    `all_names` also raises for a tensor that is missing or unknown. Pass False if PEFT may rename tensors while it
    loads them.

    Returns:
        The tensors of the folder.

    Raises:
        MolaError: the configuration is wrong, or a tensor has a different shape.
    """
    read = read_tensors(folder)
    tensors = {name: each for name, each in read.items() if "lora_" in name}
    expected = get_peft_model_state_dict(put_lora_into(model_on_meta, folder), save_embedding_layers=False)
    shapes = {name: tuple(each.shape) for name, each in expected.items() if "lora_" in name}
    for name in sorted(shapes.keys() | tensors.keys()):
        is_in_both = name in shapes and name in tensors
        # PEFT renames the tensors of a base model's own experts while it loads them.
        if is_in_both or (all_names and ".experts." not in name):
            check_shape(tensors.get(name), shapes.get(name), name, folder)
    return read


def put_lora_into(model_on_meta: nn.Module, folder: Path) -> Any:
    """Put a LoRA into a model without weights; skip the LoRA's own initialisation, which may need weights.

    Raises:
        MolaError: PEFT cannot use the configuration at all, or cannot use it for this model.
    """
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path, config.init_lora_weights = None, True
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            return get_peft_model(model_on_meta, config)
    except Exception as error:  # PEFT does not validate the file
        raise MolaError(f"the adapter does not fit the base model: {str(folder)!r}: {error}") from error


def check_shape(tensor: torch.Tensor | None, expected: tuple[int, ...] | None, name: str, folder: Path) -> torch.Tensor:
    """Return the tensor if it has the expected shape.

    Raises:
        MolaError: the tensor is missing or not floating-point, or has a different shape.
    """
    if tensor is None or tuple(tensor.shape) != expected or not tensor.is_floating_point():
        found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)} and {tensor.dtype}"
        problem = f"{name!r} of {str(folder)!r} {found}, expected {expected}"
        if expected is None:
            problem = f"unexpected tensor {name!r} in {str(folder)!r}"
        raise MolaError(
            f"the adapter does not fit: {problem}. Pass the base model it was trained on, or copy the folder again."
        )
    return tensor


_INITIALISED_FROM_BASE = ("pissa", "olora", "corda", "loftq")  # these change the base weight when a LoRA is loaded


def changes_base(config: Mapping[str, Any]) -> str | None:
    """The change to the base model that remains when an adapter is switched off; None if nothing remains.

    The change is a predicate such as "trained the base model's biases"; `config` is the adapter's configuration.
    """
    initialisation = str(config.get("init_lora_weights")).lower()
    if config.get("peft_type") == "LORA" and initialisation.startswith(_INITIALISED_FROM_BASE):
        return (
            f"subtracts its start from the base model's weights (`init_lora_weights` {config['init_lora_weights']!r})"
        )
    if config.get("kasa_config"):
        return "reduces the rank of the base model's weights (`kasa_config`)"
    if config.get("bias") not in (None, "none"):
        return f"trained the base model's biases (`bias` {config['bias']!r})"
    return "repeats the base model's layers (`layer_replication`)" if config.get("layer_replication") else None


def as_mapping(
    adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
) -> dict[str, str | os.PathLike[str]]:
    """Return adapters as name -> folder, from one folder, a mapping or None.

    Raises:
        MolaError: PyTorch cannot use a name.
    """
    if adapter is None:
        return {}
    if not isinstance(adapter, Mapping):
        return {"default": adapter}
    for name in adapter:
        if not name or "." in name:
            raise MolaError(f"`adapter` needs names without dots, not empty: got {name!r}. Pass a different name.")
    return dict(adapter)


def warn_other_base(
    base_model: str | os.PathLike[str], folder: str | os.PathLike[str], config: Mapping[str, Any]
) -> None:
    """Warn if an adapter was trained on a different base model; see `is_recorded_base`."""
    recorded = config.get("base_model_name_or_path")
    if not is_recorded_base(base_model, recorded):
        logger.warning(
            "The adapter %s was trained on %s, `base_model` is %s: results are meaningful only if these are "
            "the same weights.",
            folder,
            recorded,
            os.fspath(base_model),
        )


@contextmanager
def adapter_errors(folder: str) -> Iterator[None]:
    """Turn errors of PEFT while it loads the adapter in `folder` into errors that name the folder.

    Raises:
        MolaError: the adapter does not fit the base model; lack of memory is raised unchanged.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if memory_error_reason(error):
            raise
        raise MolaError(f"`adapter` does not fit the base model: {folder!r}: {error}") from error


def attach(model: Any, name: str, folder: str) -> PeftModel:
    """Load one adapter into a model, and check that every tensor of the adapter was used.

    Raises:
        MolaError: the adapter does not fit. A base model without adapters is left unchanged; from a model that already
            has adapters, the caller must delete the new one.
    """
    # PEFT itself would read the tensors onto the first GPU, wherever the model is.
    device = next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))
    settings: Any = {"adapter_name": name, "autocast_adapter_dtype": False, "torch_device": str(device)}
    with nullcontext() if isinstance(model, PeftModel) else _unchanged_on_error(model):
        with adapter_errors(folder), warnings.catch_warnings():
            # Missing tensors raise below, so PEFT's own warning would only repeat it.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            if not isinstance(model, PeftModel):
                model = PeftModel.from_pretrained(model, folder, **settings)
            # For a first adapter this reads the file again: `from_pretrained` does not return which tensors it used.
            result = model.load_adapter(folder, **settings)
        config = model.peft_config[name]
        missing = [key for key in _keys_of(name, config.peft_type, result.missing_keys) if _SHARED not in key]
        # The virtual tokens of prompt learning have no key in the model.
        virtual = ["prompt_embeddings"] if config.is_prompt_learning else []
        unused = [key for key in result.unexpected_keys if key not in virtual]
        for problem, keys in (("missing", missing), ("not used by it", unused)):
            if keys:
                raise MolaError(
                    f"`adapter` does not match its configuration: {folder!r} has {len(keys)} tensors {problem}, "
                    f"such as {keys[0]!r}. Pass the base model it was trained on, or save the adapter again."
                )
        return model


@contextmanager
def _unchanged_on_error(base: Any) -> Iterator[None]:
    """Remove what an adapter has put into a base model if the block raises."""
    children = [(module, dict(module._modules)) for module in base.modules()]
    attributes = set(vars(base))
    try:
        yield
    except BaseException:
        RouterLosses.remove(base)
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
        for name in set(vars(base)) - attributes:
            delattr(base, name)
        raise


def _keys_of(name: str, peft_type: Any, keys: list[str]) -> list[str]:
    """Select the keys of the adapter `name`.

    PEFT searches the adapter's name anywhere in a key, so an adapter "b" also matches keys with "base_model".
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_type, "")
    return [
        key
        for key in keys
        if any(before.startswith(prefix) and part == name for before, part in itertools.pairwise(key.split(".")))
    ]

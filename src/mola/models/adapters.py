"""Adapters on disk and on a model: what a folder must hold, and that every tensor found its place.

Adapters of any PEFT method load, not only ours; one that does not fit the model is an error.
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
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError

from mola.checkpoints.formats import conversion_hint
from mola.checkpoints.tensors import read_tensors
from mola.errors import MolaError
from mola.files.digests import WEIGHTS_FILES, find_weights
from mola.files.failures import lack_of_memory
from mola.files.reading import read_json
from mola.models.base_model import model_name
from mola.tuner import MolaConfig  # this registers the method with PEFT
from mola.tuner.loading import check_adapter_tensors
from mola.tuner.replication import layer_settings, restore
from mola.tuner.router_losses import RouterLosses

logger = logging.getLogger(__name__)

_SHARED = "vblora_vector_bank"  # one tensor of all layers of VB-LoRA, saved once


def check_adapter(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the configuration of an adapter folder, and look at its weights.

    Returns:
        The content of its `adapter_config.json`.

    Raises:
        MolaError: no such folder, its `adapter_config.json` or weights are missing, unreadable or damaged, or it is in
            a format that `mola convert` has to translate first.
    """
    folder = Path(adapter)
    path = folder / "adapter_config.json"
    if not os.path.isfile(path):
        missing = "no adapter_config.json in it" if os.path.isdir(folder) else "no such folder"
        raise MolaError(
            f"`adapter` must be a folder that holds an adapter: {str(folder)!r}, {missing}. "
            f"Pass the folder that training or `mola convert` wrote.{_hint_of_the_hub(folder)}"
        )
    if find_weights(folder) is None:
        raise MolaError(
            f"`adapter` has no weights: neither {' nor '.join(WEIGHTS_FILES)} is in "
            f"{str(folder)!r}. Was the training interrupted before it saved?"
        )
    try:
        config = read_json(path)
    except OSError as error:
        raise MolaError(f"`adapter` has a configuration that cannot be read: {error}. Check the file.") from error
    except ValueError as error:
        raise MolaError(f"`adapter` has a broken configuration: {path} is no JSON ({error}).") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise MolaError(f"`adapter` has a broken configuration: {path} has no `peft_type`.")
    hint = conversion_hint(config, str(folder))
    if hint:
        raise MolaError(f"`adapter` must be in PEFT's format: {hint}")
    if str(config["peft_type"]) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(each.value for each in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise MolaError(
            f"`adapter` must be of a method that the installed PEFT knows: {path} has `peft_type` "
            f"{config['peft_type']!r}, not one of {known}. Update PEFT, or install what brings this method."
        )
    read_tensors(folder)  # cut off, damaged or not finite: known before a base model is loaded
    return config


def _hint_of_the_hub(folder: Path) -> str:
    name = folder.as_posix()
    if os.path.exists(folder) or folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        return ""
    return f" If it is on the Hub, fetch it first: hf download {name} --local-dir {folder.name}"


def check_fits(model_on_meta: Any, config: MolaConfig, tensors: Mapping[str, torch.Tensor]) -> PeftModel:
    """Whether a mixture fits a model, with no weights of either needed.

    Args:
        model_on_meta: the base model on the meta device; the experts are put into it.
        config: the adapter's configuration; stays as it is.
        tensors: its tensors under the names they have in a file; only their shapes and values are looked at.

    Returns:
        The model with the experts, without weights.

    Raises:
        MolaError: another kind of model, a tensor that is missing or unknown, another shape, or no finite values.
    """
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # the model has none either; PEFT would warn of the difference
    try:
        with torch.device("meta"):
            adapted: Any = get_peft_model(model_on_meta, config)
    except MolaError:
        raise
    except Exception as error:  # PEFT believes what the configuration says
        raise MolaError(f"the adapter's configuration cannot be put into the base model: {error}") from error
    check_adapter_tensors(adapted, "default", {f"{key}.default": value for key, value in tensors.items()})
    return adapted


_STARTS_IN_BASE = ("pissa", "olora", "corda", "loftq")  # of PEFT's LoRA, each time it is loaded


def changes_base(config: Mapping[str, Any]) -> str | None:
    """What an adapter changes in the base model that switching it off, or others on, does not undo; None for nothing.

    Args:
        config: the content of its `adapter_config.json`.
    """
    start = str(config.get("init_lora_weights")).lower()
    if config.get("peft_type") == "LORA" and start.startswith(_STARTS_IN_BASE):
        return f"takes its start out of the base model's weights (`init_lora_weights` {config['init_lora_weights']!r})"
    if config.get("kasa_config"):
        return "cuts the base model's weights (`kasa_config`)"
    if config.get("bias") not in (None, "none"):
        return f"trained the base model's biases (`bias` {config['bias']!r})"
    return "repeats the base model's layers (`layer_replication`)" if config.get("layer_replication") else None


def as_mapping(
    adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
) -> dict[str, str | os.PathLike[str]]:
    """Adapters as name -> folder, whatever way they were given.

    Raises:
        MolaError: a name that PyTorch cannot use.
    """
    if adapter is None:
        return {}
    if not isinstance(adapter, Mapping):
        return {"default": adapter}
    for name in adapter:
        if not name or "." in name:
            raise MolaError(f"`adapter` needs names without dots, not empty: got {name!r}. Pass another name.")
    return dict(adapter)


def warn_other_base(
    base_model: str | os.PathLike[str], folder: str | os.PathLike[str], config: Mapping[str, Any]
) -> None:
    """Say it when an adapter was trained on a base model of another name."""
    recorded = config.get("base_model_name_or_path")
    if recorded and isinstance(recorded, str) and model_name(recorded) != model_name(base_model):
        logger.warning(
            "The adapter %s was trained on %s, `base_model` is %s: results are meaningful only if these are "
            "the same weights.",
            folder,
            recorded,
            os.fspath(base_model),
        )


def attach(model: Any, name: str, folder: str) -> PeftModel:
    """Add one adapter and check that every one of its tensors found its place.

    Raises:
        MolaError: it does not fit. A base model without adapters is as it was then; of a model with others the new one
            has to be deleted.
    """
    with nullcontext() if isinstance(model, PeftModel) else _as_before(model):
        return _attach(model, name, folder)


@contextmanager
def _as_before(base: Any) -> Iterator[None]:
    """Take out of a base model what an adapter has put into it, if the block raises: nothing else knows it then."""
    children = [(module, dict(module._modules)) for module in base.modules()]
    attributes, settings = set(vars(base)), layer_settings(base)
    try:
        yield
    except BaseException:
        RouterLosses.remove(base)
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
        for name in set(vars(base)) - attributes:
            delattr(base, name)
        restore(settings)
        raise


def _attach(model: Any, name: str, folder: str) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # Missing tensors are an error below, so PEFT's own warning would only repeat it.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # Where the model is: by itself PEFT reads them onto a first GPU, whoever uses that.
            how: Any = {"adapter_name": name, "autocast_adapter_dtype": False, "torch_device": str(_device_of(model))}
            if not isinstance(model, PeftModel):
                model = PeftModel.from_pretrained(model, folder, **how)
            # A first adapter once more: `from_pretrained` does not tell which tensors found no place.
            result = model.load_adapter(folder, **how)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if lack_of_memory(error):
            raise
        raise MolaError(f"`adapter` does not fit the base model: {folder!r}: {error}") from error
    config = model.peft_config[name]
    missing = [key for key in _keys_of(name, config.peft_type, result.missing_keys) if _SHARED not in key]
    # PEFT puts virtual tokens where no key of the model says so.
    unknown = [key for key in result.unexpected_keys if not (config.is_prompt_learning and key == "prompt_embeddings")]
    for problem, keys in (("missing", missing), ("not used by it", unknown)):
        if keys:
            raise MolaError(
                f"`adapter` does not match its configuration: {folder!r} has {len(keys)} tensors {problem}, "
                f"such as {keys[0]!r}. Pass the base model it was trained on, or save the adapter again."
            )
    return model


def _device_of(model: Any) -> torch.device:
    return next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))


def _keys_of(name: str, peft_type: Any, keys: list[str]) -> list[str]:
    """Keys that are one adapter's; PEFT looks for the name anywhere, so `"b"` also finds `"base_model"`."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_type, "")
    parts = [(key, key.split(".")) for key in keys]
    return [
        key
        for key, path in parts
        if any(before.startswith(prefix) and part == name for before, part in itertools.pairwise(path))
    ]

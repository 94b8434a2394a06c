"""Shared by the plug-ins: reads the settings of a mixture from a trainer's fields, and checks what is not supported."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.notation import pattern_with, resolve_per_layer
from mola.architecture.targets import linear_shapes
from mola.errors import MolaError
from mola.files.digests import check_digest
from mola.files.reading import read_json
from mola.training.fields import TRAINING_ONLY
from mola.tuner import MolaConfig

FIELDS = (
    "num_experts",
    "top_k",
    "router",
    "router_aux_loss_reduction",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
)
PREFIX = "mola_"
_NUMBERS = {field.name for field in dataclasses.fields(MolaConfig) if field.type == "float"}


def check_version(host: str, found: str, tried: str) -> None:
    """Warn if the trainer's version does not begin with `tried`, the version with which the plug-in was run."""
    if not f"{found}.".startswith(f"{tried}."):
        warnings.warn(f"mola was tried with {host} {tried}, this is {found}: other fields may exist.", stacklevel=2)


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields `mola_<name>` of a trainer as settings by the names of `MolaConfig`; skip all other fields.

    Raises:
        MolaError: a field `mola_<name>` is unknown, a setting lacks the prefix, or a value is wrong.
    """
    names = {f"{PREFIX}{name}": name for name in FIELDS}
    unknown = [name for name in given if name in FIELDS or (name.lower().startswith(PREFIX) and name not in names)]
    if unknown:
        raise MolaError(f"There is no {unknown}. The settings of a mixture are {list(names)}.")
    return checked_settings({names[name]: value for name, value in given.items() if name in names})


def checked_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not None, with text converted to the numbers and lists that `MolaConfig` expects.

    Raises:
        MolaError: a value is wrong.
    """
    settings = {name: _number_or_list(name, value) for name, value in given.items() if value is not None}
    MolaConfig(**settings)
    return settings


def _number_or_list(name: str, value: Any) -> Any:
    """Convert text from a command line, or from YAML, which reads `1e-3` as text; leave other text to `MolaConfig`."""
    if isinstance(value, str) and (name in _NUMBERS or value.startswith("[")):
        try:
            return float(value) if name in _NUMBERS else json.loads(value)
        except ValueError:
            pass
    return value


def check_unused_fields(host: str, arguments: Any, group: type, used_fields: tuple[str, ...]) -> None:
    """Check that the user has not changed fields of the trainer that a mixture would ignore.

    Args:
        host: name of the trainer.
        arguments: the trainer's arguments.
        group: dataclass with the fields to check.
        used_fields: names of the fields in `group` that a mixture uses.

    Raises:
        MolaError: an unused field differs from its default.
    """
    changed = []
    for field in dataclasses.fields(group):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(arguments, field.name)
        if field.name not in used_fields and value != default:
            changed.append(f"`{field.name}` ({value!r})")
    if changed:
        raise MolaError(f"A mixture ignores {', '.join(changed)} of {host}: leave it out.")


def has_router_losses(settings: Mapping[str, Any]) -> bool:
    """Whether the settings switch a router loss on."""
    return any(settings.get(name) for name in ("router_aux_loss_coef", "router_z_loss_coef"))


def is_mixture(folder: str | Path | None) -> bool:
    """Whether a folder holds a saved mixture."""
    path = Path(folder or "", "adapter_config.json")
    return bool(folder) and path.is_file() and read_json(path).get("peft_type") == "MOLA"


def raise_not_mergeable(name: str) -> NoReturn:
    """Raise for the option `name`, which would merge a mixture into the base model.

    Raises:
        MolaError: always.
    """
    raise MolaError(
        f"{name}: a mixture cannot be merged, since its gates depend on the input. The plain LoRA nearest to it can: "
        "`mola convert ADAPTER --to lora --r R --output LORA`, then `mola merge LORA --output MERGED`."
    )


def continued_config(
    model: nn.Module, folder: str, settings: Mapping[str, Any], prefix: str = "", **kwargs: Any
) -> MolaConfig:
    """The configuration of a saved mixture, with the settings that may change when training resumes.

    Args:
        model: the base model.
        folder: the adapter's folder.
        settings: fields of `MolaConfig` that the user has set.
        prefix: the trainer's prefix for the names of settings, used in messages.
        kwargs: arguments for `PeftConfig.from_pretrained`.

    Raises:
        MolaError: the adapter is not a mixture, or the settings contradict its structure.
    """
    config = PeftConfig.from_pretrained(folder, **kwargs)
    check_digest(Path(folder, kwargs.get("subfolder") or ""))
    if not isinstance(config, MolaConfig):
        raise MolaError(f"{folder!r} is of type {config.peft_type}, not a mixture.")
    for name in sorted(set(settings) - set(TRAINING_ONLY)):
        if not _is_same(name, settings[name], config, model):
            raise MolaError(
                f"`{prefix}{name}` is {getattr(config, name)!r} in {folder!r}, not {settings[name]!r}: leave it out, "
                "or start with new experts."
            )
    return dataclasses.replace(config, **{name: settings[name] for name in settings if name in TRAINING_ONLY})


def _is_same(name: str, value: Any, config: MolaConfig, model: nn.Module) -> bool:
    """Whether a value of the field `name` means the same as that of `config`, though it may be written differently."""
    saved = getattr(config, name)
    if saved == value:
        return True
    if name in ("num_experts", "top_k", "r"):
        layers = LayerStacks.of(model).num_layers or 1
        pattern = pattern_with(value, None) if name == "num_experts" else None
        is_same_pattern = pattern in (None, {}, config.num_experts_pattern)
        return is_same_pattern and resolve_per_layer(saved, layers, name) == resolve_per_layer(value, layers, name)
    if name in ("target_parameters", "modules_to_save", "layers_to_transform"):
        return isinstance(saved, list) and isinstance(value, list) and sorted(saved) == sorted(value)
    if name == "target_modules":
        return linear_shapes(model, saved, config.exclude_modules) == linear_shapes(model, value)
    return False


def continue_mixture(model: Any, folder: str, settings: Mapping[str, Any], **kwargs: Any) -> PeftModel:
    """Load a saved mixture for training; see `continued_config`."""
    config = continued_config(model, folder, settings, PREFIX, **kwargs)
    return require_router_losses(PeftModel.from_pretrained(model, folder, config=config, is_trainable=True, **kwargs))


def require_router_losses(model: PeftModel) -> PeftModel:
    """Make the first training step raise if the trainer computes its loss from logits, which omits router losses."""
    if has_router_losses(vars(model.peft_config["default"])):
        model.register_forward_hook(_check_has_loss)
    return model


def _check_has_loss(model: Any, inputs: Any, output: Any) -> None:
    if model.training and torch.is_grad_enabled() and getattr(output, "loss", None) is None:
        raise MolaError(
            "The trainer computes this loss from logits (label smoothing, a scale per token, preferences), without the "
            "router losses: choose another loss, or set the mixture's `router_aux_loss_coef` and `router_z_loss_coef` "
            "to 0."
        )

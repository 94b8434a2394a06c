"""What the plug-ins share: a mixture's settings out of a trainer's fields, and what a trainer must not do with it."""

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
from mola.training.options import TRAINING_ONLY
from mola.tuner import MolaConfig

FIELDS = (
    *("num_experts", "top_k", "router", "router_aux_loss_reduction"),
    *("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"),
)
PREFIX = "mola_"
_NUMBERS = {field.name for field in dataclasses.fields(MolaConfig) if field.type == "float"}


def check_version(host: str, found: str, tried: str) -> None:
    """Warn of a version of the trainer with which nobody has run the plug-in; `tried` is how those begin that were."""
    if not f"{found}.".startswith(f"{tried}."):
        warnings.warn(f"mola was tried with {host} {tried}, this is {found}: other fields may exist.", stacklevel=2)


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names of `MolaConfig` out of fields `mola_<name>`; what is none of theirs is passed over.

    Raises:
        MolaError: there is no such setting, or its value is wrong.
    """
    names = {f"{PREFIX}{name}": name for name in FIELDS}
    unknown = [name for name in given if name in FIELDS or (name.lower().startswith(PREFIX) and name not in names)]
    if unknown:
        raise MolaError(f"There is no {unknown}. The settings of a mixture are {list(names)}.")
    return checked_settings({names[name]: value for name, value in given.items() if name in names})


def checked_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `MolaConfig` that are not None, with numbers and lists where a text stands for one.

    Raises:
        MolaError: a value is wrong.
    """
    settings = {name: _number_or_list(name, value) for name, value in given.items() if value is not None}
    MolaConfig(**settings)
    return settings


def _number_or_list(name: str, value: Any) -> Any:
    """What a command line, or YAML where `1e-3` is a text, has made a text of; what is wrong stays as it is."""
    if isinstance(value, str) and (name in _NUMBERS or value.startswith("[")):
        try:
            return float(value) if name in _NUMBERS else json.loads(value)
        except ValueError:
            pass
    return value


def refuse_others(host: str, arguments: Any, group: type, honoured: tuple[str, ...]) -> None:
    """Refuse settings of one of the trainer's groups of fields that were changed, except those of a mixture.

    Raises:
        MolaError: there are some.
    """
    changed = []
    for field in dataclasses.fields(group):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(arguments, field.name)
        if field.name not in honoured and value != default:
            changed.append(f"`{field.name}` ({value!r})")
    if changed:
        raise MolaError(f"A mixture has no use for {', '.join(changed)} of {host}: leave it out.")


def has_router_losses(settings: Mapping[str, Any]) -> bool:
    """Whether settings by name switch a router loss on."""
    return any(settings.get(name) for name in ("router_aux_loss_coef", "router_z_loss_coef"))


def is_mixture(folder: str | Path | None) -> bool:
    """Whether a folder holds a saved mixture."""
    path = Path(folder or "", "adapter_config.json")
    return bool(folder) and path.is_file() and read_json(path).get("peft_type") == "MOLA"


def refuse_merging(name: str) -> NoReturn:
    """Refuse an option that merges a mixture, or writes it into a file that can hold none; says what to do instead.

    Raises:
        MolaError: always.
    """
    raise MolaError(
        f"{name}: a mixture cannot be merged, since its gates depend on the input. The plain LoRA nearest to it can: "
        "`mola convert ADAPTER --to lora --rank R --base_model MODEL --output LORA`, then "
        "`mola merge LORA --base_model MODEL --output MERGED`."
    )


def continued_config(
    model: nn.Module, folder: str, settings: Mapping[str, Any], prefix: str = "", **kwargs: Any
) -> MolaConfig:
    """The configuration of a saved mixture, to train on or to ask, with those of `settings` that only training reads.

    Args:
        model: the base model.
        folder: of the adapter.
        settings: fields of `MolaConfig`.
        prefix: what the trainer puts before their names, for messages.
        kwargs: for `PeftConfig.from_pretrained`.

    Raises:
        MolaError: it is no mixture, or of another structure than `settings` say.
    """
    config = PeftConfig.from_pretrained(folder, **kwargs)
    check_digest(Path(folder, kwargs.get("subfolder") or ""))
    if not isinstance(config, MolaConfig):
        raise MolaError(f"{folder!r} is of type {config.peft_type}, no mixture: it cannot be trained on here.")
    layers = LayerStacks.of(model).num_layers or 1
    for name in sorted(set(settings) - set(TRAINING_ONLY)):
        own, other = getattr(config, name), settings[name]
        if own == other:
            continue
        if name in ("num_experts", "top_k", "r"):
            is_same = resolve_per_layer(own, layers, name) == resolve_per_layer(other, layers, name)
            if name == "num_experts":
                is_same = is_same and pattern_with(other, None) in (None, {}, config.num_experts_pattern)
        elif name in ("target_parameters", "modules_to_save", "layers_to_transform"):  # in any order
            is_same = isinstance(own, list) and isinstance(other, list) and sorted(own) == sorted(other)
        else:  # target modules may be the same in other words
            is_same = name == "target_modules" and (
                linear_shapes(model, own, config.exclude_modules) == linear_shapes(model, other)
            )
        if not is_same:
            raise MolaError(
                f"`{prefix}{name}` is {own!r} in {folder!r}, not {other!r}: leave it out, or begin with new experts."
            )
    return dataclasses.replace(config, **{name: settings[name] for name in settings if name in TRAINING_ONLY})


def continue_mixture(model: Any, folder: str, settings: Mapping[str, Any], **kwargs: Any) -> PeftModel:
    """Load an adapter to train on, as `continued_config` says."""
    config = continued_config(model, folder, settings, PREFIX, **kwargs)
    return keep_router_losses(PeftModel.from_pretrained(model, folder, config=config, is_trainable=True, **kwargs))


def keep_router_losses(model: PeftModel) -> PeftModel:
    """Refuse at its first step a loss that leaves the router losses out, as one computed from logits does."""
    if has_router_losses(vars(model.peft_config["default"])):
        model.register_forward_hook(_refuse_outputs_without_loss)
    return model


def _refuse_outputs_without_loss(model: Any, inputs: Any, output: Any) -> None:
    if model.training and torch.is_grad_enabled() and getattr(output, "loss", None) is None:
        raise MolaError(
            "This loss of the trainer is computed from logits (label smoothing, a scale per token, preferences), and "
            "leaves router losses out: choose another, or set the mixture's `router_aux_loss_coef` and "
            "`router_z_loss_coef` to 0."
        )

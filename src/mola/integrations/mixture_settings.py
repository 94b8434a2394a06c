"""What the plug-ins share: a mixture's settings out of a trainer's fields, and what a trainer must not do with it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PeftModel

from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.notation import resolve_per_layer
from mola.errors import MolaError
from mola.tuner import MolaConfig

NUMBERS = ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise")
FIELDS = ("num_experts", "top_k", "router", "router_aux_loss_reduction", *NUMBERS)
PREFIX = "mola_"


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
    settings = {names[name]: value for name, value in given.items() if name in names and value is not None}
    settings = {name: _number_or_list(name, value) for name, value in settings.items()}
    MolaConfig(**settings)
    return settings


def _number_or_list(name: str, value: Any) -> Any:
    """What a command line, or YAML where `1e-3` is a text, has made a text of; what is wrong stays as it is."""
    if isinstance(value, str) and (name in NUMBERS or value.startswith("[")):
        try:
            return float(value) if name in NUMBERS else json.loads(value)
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


def continue_mixture(model: Any, folder: str, settings: Mapping[str, Any], **kwargs: Any) -> PeftModel:
    """Load an adapter to train on; settings of the router's losses and its jitter may differ from its own.

    Raises:
        MolaError: it is no mixture, or of another structure than `settings` say.
    """
    config = PeftConfig.from_pretrained(folder, **kwargs)
    if not isinstance(config, MolaConfig):
        raise MolaError(f"{folder!r} is of type {config.peft_type}, no mixture: it cannot be trained on here.")
    layers = LayerStacks.of(model).num_layers or 1
    for name in ("num_experts", "top_k", "router"):
        own: Any = getattr(config, name)
        other: Any = settings.get(name, own)
        is_same = other == own
        if not is_same and name != "router":
            is_same = resolve_per_layer(own, layers, name) == resolve_per_layer(other, layers, name)
        if not is_same:
            raise MolaError(f"`{PREFIX}{name}` is {own!r} in {folder!r}, not {other!r}: leave it out to train on.")
    config = dataclasses.replace(config, **{name: settings[name] for name in settings if name in FIELDS[3:]})
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
            "leaves router losses out: choose another, or set `mola_router_aux_loss_coef` and "
            "`mola_router_z_loss_coef` to 0."
        )

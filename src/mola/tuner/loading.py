"""Refuses adapter files that do not fit the model: PEFT itself would load what matches and go on."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from mola.errors import MolaError
from mola.files.digests import check_finite
from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters

PREFIX = "base_model.model."  # of names in a PeftModel
_OWN = re.compile(r"\.mola_(?:[AB](?:_\w+)?|router)\.[^.]+$")
_CHECKED = "_mola_checked_when_loaded"


def check_model_type(trained_on: str | None, found: str | None) -> None:
    """Refuse another kind of base model, whose linears may have the same names and shapes.

    Args:
        trained_on: `base_model_type` in `adapter_config.json`; None, of an earlier version, says nothing.
        found: `model_type` of the base model; None for a model without a configuration.

    Raises:
        MolaError: they differ.
    """
    if trained_on is not None and found is not None and trained_on != found:
        raise MolaError(
            f"`base_model` must be the kind of model that the adapter was trained on: it is of type {found!r}, "
            f"`base_model_type` in adapter_config.json is {trained_on!r}. Pass its own base model; if this one has the "
            "same weights in another form, remove `base_model_type`."
        )


def check_adapter_tensors(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Compare the tensors of a file (already with the adapter's name in their keys) to the model's.

    PEFT before 0.21 does not ask; what `check_when_loaded` then sees are names with the prefix of a PeftModel only.

    Raises:
        MolaError: a tensor is missing, is not known to the model, has another shape, or values that are not finite.
    """
    expected = _expected_shapes(model, adapter_name)
    # A bare model takes names of both forms (with PEFT 0.18 those without the prefix), a PeftModel those with its own.
    is_bare = not any(key.startswith(PREFIX) for key in expected)
    own = {key: value for key, value in state_dict.items() if ".mola_" in key}
    found = {key.removeprefix(PREFIX): value for key, value in own.items()} if is_bare else own
    if not is_bare and found and not any(key.startswith(PREFIX) for key in found):
        raise MolaError(
            f"The adapter file does not fit a PeftModel: names of tensors, such as {next(iter(found))}, lack "
            f"{PREFIX!r} in front, as saved with `save_peft_format=False`. Save it with `save_peft_format=True`."
        )
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    if missing or unknown:
        raise MolaError(
            f"The adapter file does not fit the model: {len(missing)} of {len(expected)} tensors are missing"
            f"{_some(missing)}, {len(unknown)} are unknown{_some(unknown)}. The file is incomplete, belongs to "
            "another base model, or its adapter_config.json was changed (`num_experts`, `target_modules`)."
        )
    for key, shape in expected.items():
        if tuple(found[key].shape) != shape:
            raise MolaError(
                f"The adapter file does not fit the model: {key} has shape {tuple(found[key].shape)}, the model "
                f"needs {shape} (experts, rank or experts, features). The file belongs to another base model, or "
                "`num_experts` or `r` in adapter_config.json was changed."
            )
    check_finite(state_dict, "The adapter file")  # saved modules and trained tokens, too


def check_when_loaded(model: nn.Module) -> None:
    """Compare what is loaded into the model later, for versions of PEFT that ask nobody; only once for a model."""
    if not hasattr(model, _CHECKED):
        setattr(model, _CHECKED, model.register_load_state_dict_pre_hook(_check_loaded))


def _check_loaded(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *others: Any) -> None:
    # PEFT before 0.20 saves the tensors of other adapters too, whose names then stand before this one's.
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if _OWN.search(key)}
    for name in {key.rpartition(".")[2] for key in own}:
        check_adapter_tensors(model, name, {key: each for key, each in own.items() if key.endswith(f".{name}")})


def _expected_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, (MolaLinear, StackedParameters)):
            for part in module.adapter_layer_names:
                parameters = getattr(module, part)
                if adapter_name in parameters:
                    shapes[f"{name}.{part}.{adapter_name}"] = tuple(parameters[adapter_name].shape)
    return shapes


def _some(keys: list[str]) -> str:
    return f" (e.g. {keys[0]})" if keys else ""

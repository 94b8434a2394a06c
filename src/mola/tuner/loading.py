"""Checks that an adapter file has exactly the model's tensors; PEFT loads what matches and ignores the rest."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from mola.architecture.layer_names import PREFIX
from mola.errors import MolaError
from mola.files.digests import check_finite
from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters

_EXPERT_TENSOR = re.compile(r"\.mola_(?:[AB](?:_\w+)?|router)\.[^.]+$")
_HOOK_ATTRIBUTE = "_mola_load_hook"


def check_adapter_tensors(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Compare the tensors of a file with those of an adapter in a `PeftModel`, or in a bare model with adapters.

    The keys of `state_dict` end with the name of the adapter.

    Raises:
        MolaError: a tensor is missing, is not known to the model, has a different shape, or values that are not finite.
    """
    expected = _expected_shapes(model, adapter_name)
    own = {key: value for key, value in state_dict.items() if ".mola_" in key}
    # A bare model accepts keys with and without the prefix, a PeftModel only keys with it.
    is_bare = not any(key.startswith(PREFIX) for key in expected)
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
            f"{_example(missing)}, {len(unknown)} are unknown{_example(unknown)}. The file is incomplete, belongs to "
            "a different base model, or its adapter_config.json was changed (`num_experts`, `target_modules`)."
        )
    for key, shape in expected.items():
        if tuple(found[key].shape) != shape:
            raise MolaError(
                f"The adapter file does not fit the model: {key} has shape {tuple(found[key].shape)}, the model "
                f"needs {shape} (experts, rank or experts, features). The file belongs to a different base model, or "
                "`num_experts` or `r` in adapter_config.json was changed."
            )
    check_finite(state_dict, "The adapter file")  # includes modules and token embeddings that are trained in full


def check_on_load_state_dict(model: nn.Module) -> None:
    """Compare tensors whenever `load_state_dict` is called: PEFT before 0.21 does not call the method before loading.

    A second call for the same model does nothing.
    """
    if not hasattr(model, _HOOK_ATTRIBUTE):
        setattr(model, _HOOK_ATTRIBUTE, model.register_load_state_dict_pre_hook(_check_state_dict))


def _check_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *others: Any) -> None:
    # A file of PEFT before 0.20 also has tensors of other adapters, with their names at the end.
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if _EXPERT_TENSOR.search(key)}
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


def _example(keys: list[str]) -> str:
    return f" (e.g. {keys[0]})" if keys else ""

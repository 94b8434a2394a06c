"""Which bare parameters of a model are adapted: the experts that a base model keeps stacked in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mola.architecture.allocation import StackShape
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.linears import base_layer_of, original_modules
from mola.architecture.read_weights import is_read
from mola.architecture.targets import matches
from mola.errors import MolaError

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_transposed(module: nn.Module, weight: torch.Tensor) -> bool:
    """Whether a stack is `(count, in, out)`, as its module says; others are `(count, out, in)`."""
    return weight.dim() == 3 and bool(getattr(module, "is_transposed", False))


def find_stacks(
    model: nn.Module, target_parameters: list[str], chosen: Callable[[str], Any] | None = None
) -> list[StackShape]:
    """The parameters that `target_parameters` names, in the order of the model.

    Args:
        model: the model; weights are not read, so it may be on the meta device.
        target_parameters: names; a parameter counts whose name is one of them, or ends with "." and one of them.
        chosen: decides in place of that whether a whole name counts.

    Raises:
        MolaError: a name matches nothing, or a parameter that is no plain floating-point one with 2 or 3 dimensions.
    """
    layers, found, known = LayerStacks.of(model), [], {}
    for module_name, module in original_modules(model):
        base = base_layer_of(module)
        for parameter, weight in base.named_parameters(recurse=False):
            name = f"{module_name}.{parameter}"
            if weight.dim() == 3 and not isinstance(base, nn.Conv1d):
                known[".".join(name.split(".")[-2:])] = True
            if matches(name, target_parameters) if chosen is None else chosen(name):
                if is_read(model, module_name) or isinstance(base, nn.Conv1d):  # short ones of mixers are read, too
                    raise MolaError(
                        f"`target_parameters` must not name {name!r}: this model reads it and does not call its "
                        "module, so that a LoRA there would do nothing. Leave it out."
                    )
                if weight.dim() not in (2, 3) or type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
                    raise MolaError(
                        "`target_parameters` must name plain floating-point parameters with 2 or 3 dimensions: "
                        f"{name!r} has shape {tuple(weight.shape)} and {weight.dtype}. Load the base model without "
                        "quantisation, or leave it out."
                    )
                count, first, second = (1, *weight.shape)[-3:]
                inner, outer = (first, second) if is_transposed(base, weight) else (second, first)
                found.append(StackShape(module_name, parameter, layers.index(name), count, inner, outer))
    missing = [target for target in target_parameters if not any(matches(stack.name, [target]) for stack in found)]
    if missing:
        raise MolaError(
            f"`target_parameters` must all exist in the model, and not be left out by other fields: these do not: "
            f"{', '.join(map(repr, missing))}. Stacked experts of this model: {', '.join(known) or 'none'}."
        )
    return found

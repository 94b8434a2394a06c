"""What is frozen stays frozen while PEFT makes its parameters anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def flags_kept(module: nn.Module) -> Iterator[None]:
    """Give parameters their `requires_grad` back: one that is assigned to a `ParameterDict` becomes a trainable one."""
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    yield
    for name, parameter in module.named_parameters():
        if flags.get(name, parameter.requires_grad) != parameter.requires_grad:
            parameter.requires_grad_(flags[name])

"""An adapter that PEFT refuses late leaves nothing in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters


@contextmanager
def taken_back(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Take a new adapter out of all layers if the block raises: PEFT forgets its configuration alone.

    Its experts would be saved as part of the other adapters.
    """
    try:
        yield
    except BaseException:
        for module in model.modules():
            if isinstance(module, (MolaLinear, StackedParameters)) and adapter_name in module.settings:
                module.delete_adapter(adapter_name)
        raise

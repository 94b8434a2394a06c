"""What an adapter may be called."""

import re

from torch import nn

from mola.errors import MolaError

# Modules that hold adapters; what stands behind them in a name is theirs.
_HOLDERS = re.compile(r"(?:^|\.)(?:base_layer|original_module|modules_to_save|token_adapter|mola_\w+)(?:\.|$)")
_OURS = ("base_model", "model", "mola_A", "mola_B", "mola_router")


def check_name(adapter_name: str, model: nn.Module) -> None:
    """Refuse the name of a module: PEFT looks for an adapter's tensors by its name, among the parts of theirs.

    Raises:
        MolaError: a module of the model, or a part of its path, is called so.
    """
    parts = {*_OURS}
    for name, _ in model.named_modules():
        parts.update(_HOLDERS.split(name, maxsplit=1)[0].split("."))
    if adapter_name in parts:
        raise MolaError(
            f"An adapter cannot be called {adapter_name!r}, as modules of this model are: saving would leave out "
            "tensors. Choose another name."
        )

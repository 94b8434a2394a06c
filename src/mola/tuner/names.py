"""What an adapter may be called."""

import re
from collections.abc import Iterable

from torch import nn

from mola.errors import MolaError

# Modules that hold adapters; what stands behind them in a name is theirs.
_HOLDERS = re.compile(r"(?:^|\.)(?:base_layer|original_module|modules_to_save|token_adapter|mola_\w+)(?:\.|$)")
_OURS = ("base_model", "model", "mola_A", "mola_B", "mola_router")


def check_names(adapter_names: Iterable[str], model: nn.Module) -> None:
    """Refuse names of modules: PEFT looks for an adapter's tensors by its name, among the parts of theirs.

    It leaves out what seems to be another adapter's, too.

    Raises:
        MolaError: a module of the model, or a part of its path, is called so.
    """
    parts = {*_OURS}
    for name, _ in model.named_modules():
        parts.update(_HOLDERS.split(name, maxsplit=1)[0].split("."))
    for adapter_name in parts.intersection(adapter_names):
        raise MolaError(
            f"An adapter cannot be called {adapter_name!r}, as modules of this model are: saving would leave out "
            "tensors, also of others. Choose another name."
        )

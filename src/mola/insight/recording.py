"""What routers decide, written down while a model computes.

Recording asks each router once more, in a hook before its layer: the layer itself computes as it always does.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from mola.errors import MolaError
from mola.tuner.layer import MolaLinear
from mola.tuner.routing import route_all


class ModuleGates(NamedTuple):
    """Gates of one adapted module.

    Attributes:
        module: its name in the model.
        layer_index: its decoder layer, from 0; None outside the layers.
        gates: float32 `(N, E)` on the CPU, one row per token in the order of the input; 0 where not chosen.
        entropies: float32 `(N,)`, entropy of the router's softmax over all experts, over its largest value `log E`.
    """

    module: str
    layer_index: int | None
    gates: torch.Tensor
    entropies: torch.Tensor


@contextmanager
def recorded_gates(model: torch.nn.Module) -> Iterator[list[ModuleGates]]:
    """Record the gates of the active adapters' routers in every forward pass of a `with` block.

    Args:
        model: holds `MolaLinear` modules; those with one expert have no router and are left out.

    Yields:
        A list that grows with every call of a module.

    Raises:
        MolaError: in a forward pass with `adapter_names`.
    """
    recorded: list[ModuleGates] = []
    handles = [
        module.register_forward_pre_hook(_recorder(name, recorded))
        for name, module in model.named_modules()
        if isinstance(module, MolaLinear)
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _recorder(name: str, recorded: list[ModuleGates]) -> Any:
    def record(layer: MolaLinear, inputs: tuple[torch.Tensor, ...]) -> None:
        if layer.disable_adapters or layer.merged:
            return
        if layer.mixed_batch is not None:
            raise MolaError("Gates are recorded of one adapter at a time: leave out `adapter_names`.")
        for adapter in layer.active_adapters:
            if adapter in layer.mola_router:
                with torch.no_grad():
                    logits = layer.router_logits(adapter, inputs[0])
                    gates, _ = route_all(layer.settings[adapter].router, logits, layer.top_k[adapter], 1)
                    entropies = router_entropies(logits, dim=1)
                recorded.append(ModuleGates(name, layer.layer_index, gates.cpu(), entropies.cpu()))

    return record


@torch.no_grad()
def gates_of_tokens(model: Any, token_ids: list[int]) -> list[ModuleGates]:
    """Gates of every module for one text, from one forward pass of a model in eval mode.

    For a text that the model has generated these are the gates that it had then, but for rounding.
    """
    with recorded_gates(model) as recorded:
        model(input_ids=torch.tensor([token_ids], device=next(model.parameters()).device))
    return recorded


def router_entropies(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """Entropy of the softmax along `dim` over its largest value `log E`: one dimension less than `logits`."""
    log_probabilities = torch.log_softmax(logits, dim)
    return -(log_probabilities.exp() * log_probabilities).sum(dim) / math.log(logits.shape[dim])

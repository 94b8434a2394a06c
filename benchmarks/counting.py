"""Counts that do not depend on the machine's speed: operators, host syncs, and tensors kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Operators after which the host must know a value that the device computed.
_SYNCHRONISING = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "equal",
    "_unique",
    "unique_",
    "masked_select",
    "bincount",
    "repeat_interleave.Tensor",
)
_INDEXING = ("index.", "index_put", "_index_put_impl_", "_unsafe_index")


class OperatorCounter(TorchDispatchMode):
    """Counts ATen operators, and those that make the host wait for the device.

    Attributes:
        operators: how many ran, views and in-place ones included.
        syncs: names of the operators that made the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator and run it."""
        self.operators += 1
        result = func(*args, **(kwargs or {}))
        if _synchronises(func.__name__, args, result):
            self.syncs.append(func.__name__)
        return result


def _synchronises(name: str, args: Any, result: Any) -> bool:
    if name.startswith(_SYNCHRONISING):
        return True
    if name.startswith(_INDEXING):
        # A mask as index is turned into positions inside the operator.
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
    if name.startswith(("_to_copy", "copy_")):
        source = args[1] if name.startswith("copy_") else args[0]
        return isinstance(source, torch.Tensor) and source.is_cuda and not result.is_cuda
    return False


def count_operators(forward: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """Operators and host syncs of one forward and one backward pass."""
    with OperatorCounter() as ahead:
        loss = forward()
    with OperatorCounter() as back:
        loss.backward()
    return {
        "forward_operators": ahead.operators,
        "backward_operators": back.operators,
        "host_syncs": len(ahead.syncs) + len(back.syncs),
        "host_sync_names": sorted(set(ahead.syncs + back.syncs)),
    }


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Bytes that a forward pass keeps for its backward pass, the model's own weights left out.

    Returns:
        `saved_bytes`: every storage once, in full; `saved_bytes_repeated`: every saved tensor by its own size, also
        when several operators save the same one. What a custom function keeps outside `save_for_backward` is not
        seen; peak memory shows it.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    repeated = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal repeated
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            repeated += tensor.numel() * tensor.element_size()
        return tensor.detach()  # keeps the storage alive, so that no address is given out twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return {"saved_bytes": sum(storages.values()), "saved_bytes_repeated": repeated}

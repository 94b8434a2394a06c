"""Whose experts a B belongs to: compiled code hands over a layer's B alone, the rest is found by its address.

What compiled code reads of a module is compared before every call, and for a generated token that takes longer than the
arithmetic of a mixture. So the code of a layer reads one tensor in place of three.

A limit of this: parameters put in place of a layer's own inside of compiled code (`functional_call` within
`torch.compile`) end in an error for few tokens without gradients.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mola.tuner.pieces import PLAIN

if TYPE_CHECKING:
    from mola.tuner.layer import MolaLinear


class Owner(NamedTuple):
    """An adapter in a layer. The dictionaries are the layer's own: what they hold is never out of date.

    Attributes:
        layer: dead when the layer is; its entry goes with it.
        adapter_name: key of all dictionaries.
        experts_a, experts_b, router: parameters by adapter.
        dropout: modules by adapter.
        scaling, top_k: numbers by adapter.
    """

    layer: weakref.ref[MolaLinear]
    adapter_name: str
    experts_a: dict[str, Any]
    experts_b: dict[str, Any]
    router: dict[str, Any]
    dropout: dict[str, Any]
    scaling: dict[str, float]
    top_k: dict[str, int]

    def parts(self) -> tuple:
        """What makes two owners of one B the same."""
        name, tensors = self.adapter_name, (self.experts_a, self.experts_b, self.router)
        return *(id(each.get(name)) for each in tensors), self.scaling.get(name), self.top_k.get(name)


_layers: weakref.WeakSet[MolaLinear] = weakref.WeakSet()
_owners: dict[int, Owner] = {}  # by the address of B
_lock = threading.RLock()  # a layer may die, and its entries go, while this thread holds it


def register(layer: MolaLinear) -> None:
    """Let `owner_of` find the experts of a layer."""
    with _lock:
        _layers.add(layer)


def owner_of(experts_B: torch.Tensor) -> Owner:
    """The layer and the adapter that a B belongs to.

    Raises:
        RuntimeError: it is no layer's own, or that of layers which differ in another part.
    """
    address = experts_B.data_ptr()
    owner = _owners.get(address)
    if owner is not None:  # compared, for B may have been moved, and something else may lie there now
        own = owner.experts_b.get(owner.adapter_name)
        if own is experts_B or (own is not None and own.data_ptr() == address):
            return owner
    return _look_through_layers(experts_B, address)


def _look_through_layers(experts_B: torch.Tensor, address: int) -> Owner:
    with _lock:
        found = [owner for layer in list(_layers) for owner in _owners_in(layer, address)]
        if not found or any(owner.parts() != found[0].parts() for owner in found):
            raise RuntimeError(
                f"Compiled code of a MoLA layer got a B (`mola_B`) of shape {tuple(experts_B.shape)} that "
                + ("is no layer's own." if not found else "layers share which differ in A, router, scaling or top_k.")
                + " With parameters in place of a layer's own, put `torch.func.functional_call` around the compiled "
                "model, not into it; or compute without a compiler: `torch.compiler.set_stance('force_eager')`."
            )
        _owners[address] = found[0]
        return found[0]


def _owners_in(layer: MolaLinear, address: int) -> list[Owner]:
    parts: Any = layer._modules
    experts_A, experts_B, router = (parts[name]._parameters for name in layer.adapter_layer_names)
    reference = weakref.ref(layer, lambda _: _forget(address))
    return [
        Owner(reference, name, experts_A, experts_B, router, parts["mola_dropout"]._modules, layer.scaling, layer.top_k)
        for name, own in experts_B.items()
        if type(own) in PLAIN and own.is_cpu and own.data_ptr() == address
    ]


def _forget(address: int) -> None:
    with _lock:
        owner = _owners.get(address)
        if owner is not None and owner.layer() is None:
            del _owners[address]

"""Finds the layer that owns a `mola_B`: compiled code hands over a layer's B alone.

What compiled code reads of a module is compared before every call, and for a generated token that takes longer than the
arithmetic of a mixture. So the code of a layer reads one tensor, and its layer is remembered here: nothing is left
on the tensor, which has to be pickled now and then.

A limit of this: parameters put in place of a layer's own inside of compiled code (`functional_call` within
`torch.compile`) end in an error for few tokens without gradients.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_known: dict[int, Owner] = {}  # by the `id` of a B


class Owner(NamedTuple):
    """An adapter in a layer, a `MolaLinear`."""

    layer: weakref.ref[Any]
    adapter_name: str


def register(layer: Any) -> None:
    """Let `owner_of` find a layer."""
    _layers.add(layer)


def owner_of(experts_B: torch.Tensor) -> Owner:
    """The layer and the adapter that a B belongs to.

    Raises:
        RuntimeError: it is no layer's own, or that of layers which differ in another part.
    """
    key = id(experts_B)
    owner = _known.get(key)
    if owner is not None:  # looked at again: the layer may have got another B, and another tensor the `id`
        layer = owner.layer()
        if layer is not None and layer._modules["mola_B"]._parameters.get(owner.adapter_name) is experts_B:
            return owner
    found = [
        Owner(weakref.ref(layer, lambda _: _known.pop(key, None)), name)
        for layer in list(_layers)
        for name, own in layer._modules["mola_B"]._parameters.items()
        if own is experts_B
    ]
    if not found or any(_parts(owner) != _parts(found[0]) for owner in found):
        raise RuntimeError(
            f"Compiled code of a MoLA layer got a B (`mola_B`) of shape {tuple(experts_B.shape)} that "
            + ("is no layer's own." if not found else "layers share which differ in A, router, scaling or top_k.")
            + " With parameters in place of a layer's own, put `torch.func.functional_call` around the compiled "
            "model, not into it; or compute without a compiler: `torch.compiler.set_stance('force_eager')`."
        )
    _known[key] = found[0]
    return found[0]


def _parts(owner: Owner) -> tuple:
    """What makes two owners of one B the same."""
    layer, name = owner.layer(), owner.adapter_name
    if layer is None:
        return ()
    tensors = (layer._modules[part]._parameters.get(name) for part in ("mola_A", "mola_router"))
    return *map(id, tensors), layer.scaling.get(name), layer.top_k.get(name)

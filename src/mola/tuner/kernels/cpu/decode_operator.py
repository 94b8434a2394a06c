"""Operators for `torch.compile`: the update of a layer for few tokens, found by the layer's B.

Before every call compiled code compares everything that it reads of a module, which for one token takes longer than the
arithmetic of a mixture. So the compiled code of a layer passes its B alone, and `find_owner` finds the layer.

One limit: inside compiled code, parameters that replace a layer's own (`functional_call` within `torch.compile`)
raise an error for few tokens without gradients.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

from mola.tuner.kernels.cpu.decode import add_update, native_matrices
from mola.tuner.kernels.gemm import float32_linear

_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_owners: dict[int, Owner] = {}  # by the `id` of a B


class Owner(NamedTuple):
    """An adapter in a layer, a `MolaLinear`."""

    layer: weakref.ref[Any]
    adapter_name: str


def register_layer(layer: Any) -> None:
    """Let `find_owner` find a layer."""
    _layers.add(layer)


def find_owner(experts_B: torch.Tensor) -> Owner:
    """The layer and the adapter to which a B belongs.

    Raises:
        RuntimeError: B belongs to no layer, or to layers that differ in A, router, scaling or top_k.
    """
    key = id(experts_B)
    owner = _owners.get(key)
    if owner is not None:
        # The layer may have received a different B since the look-up, and a different tensor may have this `id` now.
        layer = owner.layer()
        if layer is not None and layer._modules["mola_B"]._parameters.get(owner.adapter_name) is experts_B:
            return owner
    owners = [
        Owner(weakref.ref(layer, lambda _: _owners.pop(key, None)), name)
        for layer in list(_layers)
        for name, parameter in layer._modules["mola_B"]._parameters.items()
        if parameter is experts_B
    ]
    if not owners or any(_identity(owner) != _identity(owners[0]) for owner in owners):
        problem = "is shared by layers that differ in A, router, scaling or top_k" if owners else "belongs to no layer"
        raise RuntimeError(
            f"Compiled code of a MoLA layer got a B (`mola_B`) of shape {tuple(experts_B.shape)} that {problem}. "
            "With parameters in place of a layer's own, put `torch.func.functional_call` around the compiled model, "
            "not into it; or compute without a compiler: `torch.compiler.set_stance('force_eager')`."
        )
    _owners[key] = owners[0]
    return owners[0]


def _identity(owner: Owner) -> tuple:
    """Everything except B that determines the update."""
    layer, name = owner.layer(), owner.adapter_name
    if layer is None:
        return ()
    tensors = (layer._modules[part]._parameters.get(name) for part in ("mola_A", "mola_router"))
    return *map(id, tensors), layer.scaling.get(name), layer.top_k.get(name)


def _decode(output: torch.Tensor, x: torch.Tensor, experts_B: torch.Tensor) -> None:
    """Add the update of the layer that owns B to the base output, in place."""
    owner = find_owner(experts_B)
    layer, name = owner.layer(), owner.adapter_name
    assert layer is not None
    matrices = native_matrices(layer, name, x, experts_B)
    if matrices is not None:
        experts_A, router = matrices
        add_update(output, x, experts_A, experts_B, router, layer.scaling[name], layer.top_k[name])
    else:
        output.copy_(layer.add_expert_output(name, x, output))


def _linear_decode(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, experts_B: torch.Tensor):
    """The float32 base output and the update in one operator: compilers call oneDNN for constant weights only."""
    output = float32_linear(x, weight, bias)
    _decode(output, x, experts_B)
    return output


# Defined by `Library`: a call of an operator that `torch.library.custom_op` defines takes longer.
_LIBRARY = torch.library.Library("mola", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_LIBRARY.define("decode(Tensor(a!) output, Tensor x, Tensor experts_B) -> ()", tags=_TAGS)
_LIBRARY.impl("decode", _decode, "CPU")
_LIBRARY.impl("decode", lambda *arguments: None, "Meta")
_LIBRARY.define("linear_decode(Tensor x, Tensor weight, Tensor? bias, Tensor experts_B) -> Tensor", tags=_TAGS)
_LIBRARY.impl("linear_decode", _linear_decode, "CPU")
_LIBRARY.impl("linear_decode", lambda x, weight, *others: x.new_empty(*x.shape[:-1], len(weight)), "Meta")

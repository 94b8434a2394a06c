"""Generating text on a CPU: mixtures that read the same input compute their experts together.

For the length of one `generate` every mixture has a `Slot`. The first forward pass with few tokens shows which mixtures
are called with the same tensor one after the other (query, key and value; gate and up): they become a `Group`. From
then on the first of a group makes one product with the routers and the A matrices of all, on a copy that has them side
by side, and chooses experts for all; the others find their gated values there.

Nothing outlives the call of `generate`. What a slot relies on is compared at every use, and where anything differs the
layer computes alone, as it always does. Not noticed: tensors written through `.data` or another view without a version
counter while `generate` runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mola.tuner.few_tokens import gates_of_few, is_few
from mola.tuner.pieces import as_rows, is_watched


class Shape(NamedTuple):
    """What mixtures must have in common to be computed together."""

    num_experts: int
    r: int
    top_k: int
    dtype: torch.dtype
    input_dtype: torch.dtype


class Gated(NamedTuple):
    """The gated values of a group for one input."""

    x: torch.Tensor
    version: int
    hidden: tuple[torch.Tensor, ...]  # (N, E*r) for each slot


class Packed(NamedTuple):
    """The thin matrices of a group side by side."""

    matrix: torch.Tensor  # routers, then A of every slot: (in, gates + gates*r)
    num_gates: int  # G*E
    halves: list[int]  # columns of the routers and of A
    parts: list[int]  # columns of each slot within A
    may_tie: bool  # whether two experts may have equal logits for every token


class Slot:
    """What one mixture knows for the length of a `generate`: its adapter, and its place in a group."""

    def __init__(self, plan: Plan, layer: Any, adapter_name: str) -> None:
        active = layer._active_adapter
        self.plan = plan
        self.layer = layer
        self.name = adapter_name
        self.active = list(active) if isinstance(active, list) else active
        self.places = [parts._parameters for parts in (layer.mola_router, layer.mola_A, layer.mola_B)]
        self.tensors = [place[adapter_name] for place in self.places]
        self.versions = [tensor._version for tensor in self.tensors]
        self.sizes = layer.num_experts[adapter_name], layer.r[adapter_name], layer.top_k[adapter_name]
        self.dropout = layer.mola_dropout[adapter_name]
        self.group: Group | None = None
        self.position = 0
        self.matrix_B: Any = None  # (E*r, out), from when the group is packed

    def add_to_base(self, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output; None if it has to compute alone."""
        group, layer = self.group, self.layer
        gated = None if group is None else group.latest
        if gated is None or gated.x is not x or gated.version != x._version:
            gated = self._gated(x)
            if gated is None:
                return None
        if layer._active_adapter != self.active:
            return None
        base, hidden, matrix_B = layer.base_layer, gated.hidden[self.position], self.matrix_B
        if type(base) is nn.Linear and not is_watched(base):
            output = F.linear(x, base.weight, base.bias)
        else:
            output = base(x).clone(memory_format=torch.contiguous_format)  # somebody else may hold it
        rows = output.view(-1, output.shape[-1])
        if rows.dtype == matrix_B.dtype:
            rows.addmm_(hidden, matrix_B, alpha=layer.scaling[self.name])
        else:
            rows.add_(torch.mm(hidden, matrix_B), alpha=layer.scaling[self.name])
        return output

    def _gated(self, x: torch.Tensor) -> Gated | None:
        if type(x) is not torch.Tensor or torch.is_grad_enabled() or x.is_inference() or not is_few(x):
            return None
        group = self.group
        if group is None:
            dtype = self.tensors[1].dtype
            if torch.promote_types(x.dtype, dtype) == dtype:  # else the layer rounds its input first
                self.plan.join(self, x)
            return None
        return group.compute(x) if group.is_current(x) else None

    def shape(self, x: torch.Tensor) -> Shape:
        """What the slots of its group must have in common."""
        return Shape(*self.sizes, self.tensors[1].dtype, x.dtype)


class Group:
    """Mixtures that read the same input."""

    def __init__(self, shape: Shape, x: torch.Tensor) -> None:
        self.shape = shape
        self.slots: list[Slot] = []
        self.latest: Gated | None = None
        self.first_input: torch.Tensor | None = x  # until packed: who reads it belongs to the group
        self.packed: Packed | None = None
        self.tensors: list[tuple[torch.Tensor, int, dict, str]] = []  # each with version, place and name
        self.layers: list[tuple[Any, Any, nn.Module, str]] = []  # each with active adapters, dropout and name

    def takes(self, slot: Slot, x: torch.Tensor) -> bool:
        """Whether a slot reads the same input, and there is still time."""
        return self.first_input is x and self.shape == slot.shape(x)

    def add(self, slot: Slot) -> None:
        """Take a slot in."""
        self.slots.append(slot)
        slot.position = len(self.slots) - 1
        slot.group = self  # last: from here on other threads use it

    def is_current(self, x: torch.Tensor) -> bool:
        """Whether its adapters are as they were when `generate` began, without dropout, and `x` of the same kind."""
        if self.packed is None:
            with self.slots[0].plan.lock:
                self.packed = self.packed or self._pack()
        for tensor, version, place, name in self.tensors:
            if tensor._version != version or place.get(name) is not tensor:
                return False
        for layer, active, dropout, name in self.layers:
            if dropout.training or layer._active_adapter != active or layer.top_k[name] != self.shape.top_k:
                return False
        return x.dtype == self.shape.input_dtype

    def _pack(self) -> Packed:
        self.first_input = None
        for slot in self.slots:
            parts = zip(slot.tensors, slot.versions, slot.places, strict=True)
            self.tensors += [(*part, slot.name) for part in parts]
            self.layers.append((slot.layer, slot.active, slot.dropout, slot.name))
        dtype = torch.promote_types(self.shape.dtype, torch.float32)
        routers, experts_A, experts_B = zip(*(slot.tensors for slot in self.slots), strict=True)
        for slot, stack in zip(self.slots, experts_B, strict=True):
            slot.matrix_B = stack.detach().flatten(0, 1).to(dtype)
        matrices = [*routers, *(stack.flatten(0, 1) for stack in experts_A)]
        num_slots, (num_experts, r, *_) = len(self.slots), self.shape
        num_gates = num_slots * num_experts
        return Packed(
            torch.cat([matrix.detach().to(dtype) for matrix in matrices]).t(),
            num_gates,
            [num_gates, num_gates * r],
            [num_experts * r] * num_slots,
            any(router.detach()[:, 0].unique().numel() < num_experts for router in routers),
        )

    def compute(self, x: torch.Tensor) -> Gated:
        """Gated values of all slots for `x: (..., in)`."""
        assert self.packed is not None
        matrix, num_gates, halves, parts, may_tie = self.packed
        rows = as_rows(x)
        if rows.dtype != matrix.dtype:
            rows = rows.to(matrix.dtype)
        logits, hidden = torch.mm(rows, matrix).split_with_sizes(halves, 1)
        gates = self._gates(logits.reshape(-1, self.shape.num_experts), may_tie)
        hidden.view(-1, num_gates, self.shape.r).mul_(gates.view(-1, num_gates, 1))
        self.latest = gated = Gated(x, x._version, hidden.split_with_sizes(parts, 1))
        return gated

    def _gates(self, logits: torch.Tensor, may_tie: bool) -> torch.Tensor:
        top_k = self.shape.top_k
        if may_tie or top_k == self.shape.num_experts:
            return gates_of_few(logits, top_k)[0]
        # Faster than a sort, but of equal logits it may choose any.
        largest, expert_indices = torch.topk(logits, top_k)
        return torch.zeros_like(logits).scatter_(1, expert_indices, torch.softmax(largest, dim=-1))


class Plan:
    """The slots and groups of one `generate`."""

    def __init__(self, layers: Iterator[Any]) -> None:
        self.lock = threading.Lock()  # one `generate` may meet another on the same model
        self.forming: Group | None = None
        self.layers = []
        for layer in layers:
            names = [name for name in layer.active_adapters if name in layer.mola_A]
            # A slot that is there belongs to a `generate` of another thread, which may be used.
            if len(names) == 1 and layer.slot is None and _fits(layer, names[0]):
                layer.slot = Slot(self, layer, names[0])
                self.layers.append(layer)

    def join(self, slot: Slot, x: torch.Tensor) -> None:
        """Put a slot into the group of the one before it if both read `x`, else into a new one."""
        with self.lock:
            if slot.group is not None:
                return
            if self.forming is None or not self.forming.takes(slot, x):
                self.forming = Group(slot.shape(x), x)
            self.forming.add(slot)

    def close(self) -> None:
        """Take the slots away."""
        for layer in self.layers:
            layer.slot = None


def _fits(layer: Any, adapter_name: str) -> bool:
    parts = [place._parameters.get(adapter_name) for place in (layer.mola_router, layer.mola_A, layer.mola_B)]
    return all(type(part) is nn.Parameter and part.is_cpu and not part.is_inference() for part in parts) and (
        parts[1].dtype == parts[2].dtype
    )


@contextmanager
def computing_together(layers: Iterator[Any]) -> Iterator[None]:
    """Let mixtures that read the same input compute together, until the context ends.

    Args:
        layers: `MolaLinear` modules of one model.
    """
    plan = Plan(layers)
    try:
        yield
    finally:
        plan.close()

"""A mixture for few tokens without gradients, as when text is generated: calls cost more there than arithmetic.

- Linears that read the same tensor (query, key and value; gate and up) choose their experts together. Which ones do is
  seen as they are called: a linear that gets the very tensor of the call before joins its group for the next time.
- Results go into buffers that stay, and weights are read through views that stay: both save calls. Views see values
  that change; a replaced tensor is noticed.
- The thin products are made in float32 for narrower formats too: on CPUs they are faster so, and more exact.

On the CPU only: for other devices it was not measured.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from mola.tuner.layer import MolaLinear

MAX_TOKENS = 32


def add_to_few_tokens(layer: MolaLinear, x: torch.Tensor) -> torch.Tensor | None:
    """Output of a layer in evaluation mode for `x: (..., in)`, not compiled; None where this way does not apply."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    place = layer.place
    if place is not None:
        output = place.siblings.take(place.member, layer, x)
        if output is not None:
            return output
    if not _applies(layer, x):
        return None
    while True:
        place = layer.place or _place_alone(layer, x)
        if place is None:
            return None
        if place.siblings.begin(x):
            return place.siblings.take(place.member, layer, x)


def _place_alone(layer: MolaLinear, x: torch.Tensor) -> Place | None:
    names = [name for name in layer.active_adapters if name in layer.mola_A]
    if len(names) != 1 or not layer.is_fusable(names[0], x):
        return None
    return Siblings([layer], names[0], x.dtype).place_of(layer)


def _applies(layer: MolaLinear, x: torch.Tensor) -> bool:
    return (
        x.is_cpu
        and 0 < x.numel() <= MAX_TOKENS * layer.in_features
        and not x.is_inference()  # has no version that would tell whether it was changed from one linear to the next
        and not torch.is_autocast_enabled("cpu")
    )


def check_places(layers: Iterable[MolaLinear]) -> None:
    """Dissolve groups whose tensors have been replaced.

    Before a forward pass of the model, so that its groups need not look themselves: all at once takes a quarter of
    the time.
    """
    for layer in layers:
        place = layer.place
        if place is not None and place.member == 0 and not place.siblings.is_current():
            place.siblings.dissolve()


class _Member:
    """Tensors of one linear as the products want them."""

    def __init__(self, layer: MolaLinear, adapter_name: str) -> None:
        base: Any = layer.base_layer
        self.layer: Any = layer
        self.base, self.name, self.active_adapter = base, adapter_name, layer._active_adapter
        self.in_A, self.in_B, self.in_router, self.in_base = (
            module._parameters for module in (layer.mola_A, layer.mola_B, layer.mola_router, base)
        )
        self.weight_A, self.weight_B = layer.mola_A[adapter_name], layer.mola_B[adapter_name]
        self.router, self.weight, self.bias = layer.mola_router[adapter_name], base.weight, base.bias
        self.pointers = self._pointers()
        self.weight_t, self.router_t = base.weight.detach().t(), self.router.detach().t()
        self.matrix_A_t = self.weight_A.detach().flatten(0, 1).t()
        self.matrix_B = self.weight_B.detach().flatten(0, 1)

    def _pointers(self) -> tuple[int, int, int, int]:
        return self.weight.data_ptr(), self.weight_A.data_ptr(), self.weight_B.data_ptr(), self.router.data_ptr()

    def is_current(self) -> bool:
        """Whether these are still the tensors of the layer, and nobody wants to see its base layer called."""
        layer, base, name, in_base = self.layer, self.base, self.name, self.in_base
        return (
            self.in_A.get(name) is self.weight_A
            and self.in_B.get(name) is self.weight_B
            and self.in_router.get(name) is self.router
            and in_base["weight"] is self.weight
            and in_base["bias"] is self.bias
            and self._pointers() == self.pointers
            and layer._modules["base_layer"] is base
            and layer._active_adapter == self.active_adapter
            and not (base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__)
        )

    def version(self) -> int:
        """A number that grows when A or the router are written to."""
        return self.weight_A._version + self.router._version


class _Running:
    """One input and the buffers for it."""

    __slots__ = (
        *("gates", "gates_per_rank", "hidden", "hidden_of", "left", "logits", "logits_of"),
        *("num_tokens", "tokens", "version", "waiting", "x"),
    )
    x: torch.Tensor | None  # None when all members have had their part
    version: int  # of the input
    waiting: list[int | None]  # version of the weights that a member's part was computed with; None: has had it
    left: int  # members that have not
    num_tokens: int
    tokens: torch.Tensor  # (N, in)
    logits: torch.Tensor  # (members, N, E)
    gates: torch.Tensor
    gates_per_rank: torch.Tensor  # (members, N, E, 1)
    hidden: torch.Tensor  # (members, N, E, r)
    logits_of: tuple[torch.Tensor, ...]
    hidden_of: tuple[torch.Tensor, ...]  # (N, E*r) each

    def __init__(self) -> None:
        self.x = None
        self.num_tokens = -1

    def allocate(self, shape: tuple[int, int, int], r: int, dtype: torch.dtype) -> None:
        """Make buffers for `(members, N, E)`."""
        self.num_tokens = shape[1]
        self.logits = torch.empty(shape, dtype=dtype)
        self.gates = torch.empty_like(self.logits)
        self.hidden = torch.empty(*shape, r, dtype=dtype)
        self.gates_per_rank = self.gates.unsqueeze(-1)
        self.logits_of, self.hidden_of = self.logits.unbind(0), self.hidden.flatten(2).unbind(0)


class _OfThread(threading.local):
    """What every thread has of its own."""

    def __init__(self) -> None:
        self.running = _Running()


class _LastCall(threading.local):
    """Who computed for which tensor last; weakly, so that no model is kept alive."""

    x: Any = staticmethod(lambda: None)
    siblings: Any = staticmethod(lambda: None)
    version = -1


_last = _LastCall()


class Place(NamedTuple):
    """Where a layer is among those that read the same input."""

    siblings: Siblings
    member: int


class Siblings:
    """Linears that read the same input: at first one, then more as they are found.

    The first member that is called with an input chooses experts for all and computes what the gates leave of `A x`;
    every member adds its own update to its base output.
    """

    def __init__(self, layers: list[MolaLinear], adapter_name: str, dtype: torch.dtype) -> None:
        self.layers, self.adapter_name, self.dtype = layers, adapter_name, dtype
        self.settings = layers[0].settings[adapter_name]
        self._inner_dtype = torch.promote_types(dtype, torch.float32)
        self._widens = self._inner_dtype != dtype
        self._scaling = self.settings.scaling
        # topk leaves the order among equal logits open. Where all are 0 (a router of zeros) this chooses the first, as
        # routing does everywhere else; other logits are too large to be changed by it.
        self._order = torch.arange(self.settings.num_experts, dtype=self._inner_dtype) * -1e-30
        self._members = [_Member(layer, adapter_name) for layer in layers]
        self._of_thread = _OfThread()
        for layer in layers:
            layer.place = self.place_of(layer)

    def place_of(self, layer: MolaLinear) -> Place:
        """The place of one of the layers."""
        return Place(self, self.layers.index(layer))

    def take(self, index: int, layer: MolaLinear, x: torch.Tensor) -> torch.Tensor | None:
        """Output of one member, `(..., out)`; None if nothing was computed for it that is still right."""
        running = self._of_thread.running
        if running.x is not x:
            return None
        member, hidden = self._members[index], running.hidden_of[index]
        if (
            running.waiting[index] != member.version()
            or running.version != x._version
            or layer._active_adapter != member.active_adapter
        ):
            return None
        if member.bias is None:
            rows = torch.mm(running.tokens, member.weight_t)
        else:
            rows = torch.addmm(member.bias, running.tokens, member.weight_t)
        if self._widens:
            rows.add_(torch.mm(hidden, member.matrix_B.to(hidden.dtype)), alpha=self._scaling)
        else:
            rows.addmm_(hidden, member.matrix_B, alpha=self._scaling)
        running.waiting[index] = None
        running.left -= 1
        if not running.left:
            running.x = None
        return rows.view(*x.shape[:-1], rows.shape[1])

    def begin(self, x: torch.Tensor) -> bool:
        """Compute for a new input; False if the layers have other places now, or none."""
        running = self._of_thread.running
        if running.x is not None:
            self._part(running)
            return False
        losses = self.layers[0].router_losses
        checked = losses is not None and losses.places_checked
        if x.dtype != self.dtype or not (checked or self.is_current()):
            self.dissolve()
            return False
        self._compute(running, x)
        self._meet(x)
        return True

    def is_current(self) -> bool:
        """Whether all tensors are still those of the layers."""
        return all([member.is_current() for member in self._members])  # noqa: C419 - a list is faster

    def dissolve(self) -> None:
        """Leave the layers without a place."""
        for layer in self.layers:
            layer.place = None

    def _compute(self, running: _Running, x: torch.Tensor) -> None:
        tokens = running.tokens = x.reshape(-1, x.shape[-1])
        if running.num_tokens != tokens.shape[0]:
            shape = len(self._members), tokens.shape[0], self.settings.num_experts
            running.allocate(shape, self.settings.r, self._inner_dtype)
        inputs = tokens.to(self._inner_dtype) if self._widens else tokens
        top_k, num_experts = self.settings.top_k, self.settings.num_experts
        for member, logits, hidden in zip(self._members, running.logits_of, running.hidden_of, strict=True):
            torch.addmm(self._order, inputs, member.router_t, out=logits)
            matrix = member.matrix_A_t
            torch.mm(inputs, matrix.to(inputs.dtype) if self._widens else matrix, out=hidden)
        if top_k == num_experts:
            torch.softmax(running.logits, dim=-1, out=running.gates)
        else:
            largest, expert_indices = torch.topk(running.logits, top_k)
            running.gates.zero_().scatter_(-1, expert_indices, torch.softmax(largest, dim=-1))
        running.hidden.mul_(running.gates_per_rank)
        running.waiting = [member.version() for member in self._members]
        running.left = len(self._members)
        running.x, running.version = x, x._version

    def _meet(self, x: torch.Tensor) -> None:
        """Become one with the group that has just computed for the same tensor, from the next input on."""
        joint = self
        if _last.x() is x and _last.version == x._version:
            other = _last.siblings()
            if other is not None and other._goes_with(self):
                joint = Siblings(other.layers + self.layers, self.adapter_name, self.dtype)
        _last.x, _last.siblings, _last.version = weakref.ref(x), weakref.ref(joint), x._version

    def _goes_with(self, other: Siblings) -> bool:
        mine, theirs = ((s.adapter_name, s.dtype, s.settings) for s in (self, other))
        layers = self.layers + other.layers
        met_before = any(each.reads_alone for each in layers) or len(set(map(id, layers))) < len(layers)
        return mine == theirs and not met_before

    def _part(self, running: _Running) -> None:
        """Let those go that did not come for their part: they read something else."""
        running.x = None
        stay = []
        for layer, waits in zip(self.layers, running.waiting, strict=True):
            layer.place = None
            if waits is None:
                stay.append(layer)
            else:
                layer.reads_alone = True
        if stay:
            Siblings(stay, self.adapter_name, self.dtype)

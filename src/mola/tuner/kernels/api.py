"""What a backend is given and what it returns.

Shapes: `N` tokens, `E` experts of rank `r`, `K = top_k`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from mola.tuner.routing import DEFAULT_ROUTER

# Reasons for which several backends do not support inputs.
NO_ROUTER = "a layer with one expert has no router"
OTHER_ROUTER = f"needs a router {DEFAULT_ROUTER!r} in float32"
NOT_PLAIN = "for plain tensors in the CPU's memory"


class FrozenLinear(NamedTuple):
    """Weight `(out, in)` and bias of a base layer that is nothing but a frozen linear map."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class MixtureSettings(NamedTuple):
    """Settings of a mixture.

    Attributes:
        top_k: experts per token.
        scaling: `lora_alpha / r`; once a dropout mask is drawn, divided by the probability of keeping an element.
        dtype: dtype of the matrix products.
        dropout: probability with which an element of the experts' input is dropped.
        jitter: relative noise on the router's input.
        router: name in `mola.tuner.routing.ROUTERS`.
        needs_router_output: whether the caller reads `Mixture.logits` and `Mixture.expert_indices`.
    """

    top_k: int
    scaling: float
    dtype: torch.dtype
    dropout: float = 0.0
    jitter: float = 0.0
    router: str = DEFAULT_ROUTER
    needs_router_output: bool = True


class MixtureInputs(NamedTuple):
    r"""One call of one adapted linear map.

        z = x Wr^T,   g = router(z)
        y = base output + scaling * sum_e g_e B_e A_e dropout(x)

    Attributes:
        x: `(..., in)`; the router reads it without dropout. In a backward pass: in the dtype of the products.
        base_output: `(..., out)`; None if `weight` is given.
        weight: `(out, in)` of a frozen base layer, in the dtype of `x`. If it is given, the backend computes the base
            output too.
        bias: `(out,)` of the frozen base layer; None without bias.
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        router: `(E, in)`, float32 or wider; None for one expert.
        dropout_mask: see `mola.tuner.kernels.dropout`; None without dropout, or if no mask is drawn yet.
        settings: see `MixtureSettings`.
    """

    x: torch.Tensor
    base_output: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    experts_A: torch.Tensor
    experts_B: torch.Tensor
    router: Any  # torch.Tensor | None
    dropout_mask: torch.Tensor | None
    settings: MixtureSettings


class Mixture(NamedTuple):
    """Result of a mixture.

    Attributes:
        output: base output plus update, `(..., out)`; not a view, because some models change it in place.
        logits: router logits, float32 `(E, N)`, with gradient. None without a router; a backend may also leave them out
            if `needs_router_output` is False.
        expert_indices: chosen experts, `(top_k, N)`, in any order; None in the same cases as `logits`.
    """

    output: torch.Tensor
    logits: torch.Tensor | None = None
    expert_indices: torch.Tensor | None = None


class Saved(NamedTuple):
    """Tensors for the backward pass: the input in the dtype of the products, and tensors of the backend's choice."""

    x: torch.Tensor
    tensors: tuple[torch.Tensor | None, ...]


class Grads(NamedTuple):
    """One value for each input that can have a gradient.

    Either the gradients, in any dtype, with None for those that are not wanted; or bools that say which are wanted.
    """

    x: Any = None
    experts_A: Any = None
    experts_B: Any = None
    router: Any = None


class Backend(ABC):
    """A way to compute a mixture.

    Attributes:
        name: the backend's name in `MOLA_KERNEL` and in reports.
        uses_autograd: whether autograd differentiates `forward`; if not, `backward` computes the gradients.
        casts_its_inputs: whether `x` and `weight` may have dtypes that differ from that of the products.
        device_type: the type of device that the backend is written for; None for all.
    """

    name: str
    uses_autograd = False
    casts_its_inputs = False
    device_type: str | None = None

    @abstractmethod
    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """None if this backend can compute the inputs on this machine, else the reason why it cannot."""

    def why_slower(self, inputs: MixtureInputs) -> str | None:
        """Why a later backend is faster for inputs that this backend can compute; None if none is."""
        return None

    @abstractmethod
    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, Saved | None]:
        """The mixture, and what `backward` needs; None for a backend without `backward`."""

    def infer(self, inputs: MixtureInputs) -> Mixture:
        """The mixture when no gradient is recorded."""
        return self.forward(inputs)[0]

    def backward(
        self,
        inputs: MixtureInputs,
        saved: tuple[torch.Tensor | None, ...],
        grad_output: torch.Tensor,
        grad_logits: torch.Tensor | None,
        wanted: Grads,
    ) -> Grads:
        """The gradients of the inputs.

        Args:
            inputs: the inputs of `forward`, except that `x` is `Saved.x`.
            saved: `Saved.tensors`.
            grad_output: gradient of the output, `(..., out)`.
            grad_logits: gradient of the logits from the router losses, `(E, N)`; None without such losses.
            wanted: bools that say which gradients are wanted.
        """
        raise NotImplementedError(f"{self.name} computes no gradients")

"""What a backend is given and what it returns.

Shapes: `N` tokens, `E` experts of rank `r`, `K = top_k`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from mola.tuner.routing import DEFAULT_ROUTER

# Reasons that several backends give.
NO_ROUTER = "a layer with one expert has no router"
OTHER_ROUTER = f"needs a router {DEFAULT_ROUTER!r} in float32"
NOT_PLAIN = "for plain tensors in the CPU's memory"


class FrozenLinear(NamedTuple):
    """Weight `(out, in)` and bias of a base layer that is nothing but a frozen linear map."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class MixtureSettings(NamedTuple):
    """What has no gradient.

    Attributes:
        top_k: experts per token.
        scaling: `lora_alpha / r`; divided by the probability of keeping an input once a dropout mask is drawn.
        dtype: of the products.
        dropout: probability with which an input of the experts is dropped.
        jitter: relative noise on the router's input.
        router: name in `mola.tuner.routing.ROUTERS`.
        needs_router_output: whether somebody reads logits and choices.
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
        x: `(..., in)`; the router sees it as it is. In a backward pass: in the dtype of the products.
        result: base output `(..., out)`; None where `weight` is given.
        weight: `(out, in)` of a frozen linear map in the dtype of `x`: its product is part of the computation then.
        bias: `(out,)` of that map.
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        router: `(E, in)`, float32 or wider; None for one expert.
        dropout_mask: see `mola.tuner.kernels.dropout`; None where nothing is dropped, or nothing is drawn yet.
        settings: see `MixtureSettings`.
    """

    x: torch.Tensor
    result: torch.Tensor | None
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
        output: base output plus update, `(..., out)`; not a view, for some models change it in place.
        logits: router logits, float32 `(E, N)`, with gradient; None if there is no router or nobody reads them.
        expert_indices: chosen experts, `(top_k, N)`, in any order; None as `logits`.
    """

    output: torch.Tensor
    logits: torch.Tensor | None = None
    expert_indices: torch.Tensor | None = None


class Saved(NamedTuple):
    """What a backward pass needs: the input in the dtype of the products, and what the backend likes to keep."""

    x: torch.Tensor
    tensors: tuple[torch.Tensor | None, ...]


class Grads(NamedTuple):
    """Gradients, each in any dtype, None where not asked for; or which are asked for, as True and False."""

    x: Any = None
    experts_A: Any = None
    experts_B: Any = None
    router: Any = None


class Backend(ABC):
    """A way to compute a mixture.

    Attributes:
        name: what `MOLA_KERNEL` and reports call it.
        is_recorded: whether autograd records what `forward` does; else `backward` is the gradient.
        casts_inputs: whether it takes `x` and `weight` in other dtypes than the products'.
        device_type: the kind of device it is written for; None for all.
    """

    name: str
    is_recorded = False
    casts_inputs = False
    device_type: str | None = None

    @abstractmethod
    def supports(self, inputs: MixtureInputs) -> str | None:
        """None, or why this backend cannot compute such inputs here."""

    def is_slower(self, inputs: MixtureInputs) -> str | None:
        """None, or why a later backend of the table is expected to be faster; asked where `supports` gives None."""
        return None

    @abstractmethod
    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, Saved | None]:
        """The mixture, and what `backward` needs; None where there is nothing to save."""

    def infer(self, inputs: MixtureInputs) -> Mixture:
        """The mixture where no gradient is recorded."""
        return self.forward(inputs)[0]

    def backward(
        self,
        inputs: MixtureInputs,
        saved: tuple[torch.Tensor | None, ...],
        grad_output: torch.Tensor,
        grad_logits: torch.Tensor | None,
        wanted: Grads,
    ) -> Grads:
        """Gradients; `inputs.x` is `Saved.x`, `grad_logits: (E, N)` comes from losses of the router."""
        raise NotImplementedError(f"{self.name} computes no gradients")

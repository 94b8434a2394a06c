"""The update of a mixture of experts, with its backward pass written out.

- All experts at once: A is one `(E*r, in)` matrix, B one `(E*r, out)`; gates act between them, in rank space.
- Kept for the backward pass: the input, which other linears that read it keep too, and tensors of rank size.
- The update is added to the base output by the product itself; no tensor of output size is made for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mola.errors import MolaError
from mola.tuner.routing import choose_gates, router_logits

_STEPS = 1 << 16  # of a probability that 16 bits decide


class MixtureSettings(NamedTuple):
    """What does not need a gradient.

    Attributes:
        top_k: experts per token.
        scaling: `lora_alpha / r`, divided by the probability of keeping an input under dropout.
        dtype: number format of the products.
    """

    top_k: int
    scaling: float
    dtype: torch.dtype


class FrozenLinear(NamedTuple):
    """Weight `(out, in)` and bias of a base layer that is nothing but a frozen linear map."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Mixture(NamedTuple):
    """Result of a mixture.

    Attributes:
        output: base output plus update, `(..., out)`.
        logits: router logits, float32 `(N, E)`, with gradient.
        expert_indices: chosen experts, `(N, top_k)`, in any order.
    """

    output: torch.Tensor
    logits: torch.Tensor
    expert_indices: torch.Tensor


def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """Booleans of the shape of `x`, False with probability `p`; see `keep_probability`.

    On the CPU 16 random bits decide about an element, a quarter of a 64-bit draw: several times
    faster than a floating-point draw for each.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep_probability(x, p))
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= round(p * _STEPS) - _STEPS // 2).view(x.shape)


def keep_probability(x: torch.Tensor, p: float) -> float:
    """Probability with which `keep_mask` says True: `1 - p`, on the CPU to the nearest of 65,536 steps."""
    return 1.0 - (round(p * _STEPS) / _STEPS if x.device.type == "cpu" else p)


def add_mixture(
    base: torch.Tensor | FrozenLinear,
    x: torch.Tensor,
    experts_A: torch.Tensor,
    experts_B: torch.Tensor,
    router: torch.Tensor,
    kept: torch.Tensor | None,
    settings: MixtureSettings,
) -> Mixture:
    r"""Add the experts' update to the base output.

        z = x Wr^T,   g = softmax over the top_k largest z
        y = base output + scaling * sum_e g_e B_e A_e (kept * x)

    Args:
        base: the base output `(..., out)`, or a frozen linear map of the products' number format: its product
            is then part of the same computation, and so is its gradient.
        x: input `(..., in)`; the router sees it as it is.
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        router: `(E, in)`, float32 or wider.
        kept: booleans `(..., in)`, False where dropout sets the experts' input to 0; None without dropout.
        settings: see `MixtureSettings`.

    Returns:
        The output and what the router said; gradients are defined once, not twice.

    Source: paper, section 3.1.
    """
    result, weight, bias = (None, *base) if isinstance(base, FrozenLinear) else (base, None, None)
    arguments = result, weight, bias, x, experts_A, experts_B, router, kept, settings
    output, logits, expert_indices = (
        _AddMixture.apply(*arguments) if torch.is_grad_enabled() else _forward(*arguments)[:3]
    )
    # Shaped out here: what a function returns as a view may not be changed in place, which some models do.
    return Mixture(output.view(*x.shape[:-1], output.shape[-1]), logits, expert_indices)


class _Forward(NamedTuple):
    output: torch.Tensor  # (N, out)
    logits: torch.Tensor
    expert_indices: torch.Tensor
    inputs: torch.Tensor  # (N, in), in the format of the products
    hidden: torch.Tensor  # (N, E*r), before the gates
    weights: torch.Tensor  # gates times scaling, float32 (N, E)


def _forward(result, weight, bias, x, experts_A, experts_B, router, kept, settings: MixtureSettings) -> _Forward:
    tokens = x.reshape(-1, x.shape[-1])
    inputs = tokens.to(settings.dtype)
    matrix_A = experts_A.flatten(0, 1).to(settings.dtype)
    # Not one product for both: the few rows of the router beside those of A measured slower than two products.
    hidden = F.linear(_dropped(inputs, kept), matrix_A)
    logits = router_logits(tokens, router)
    gates, expert_indices = choose_gates(logits, settings.top_k)
    weights = gates.mul_(settings.scaling)
    update = _gate(hidden, weights), experts_B.flatten(0, 1).to(settings.dtype)
    if weight is not None:
        output = F.linear(inputs, weight, bias).addmm_(*update)
    else:
        rows = result.reshape(-1, result.shape[-1])
        output = torch.addmm(rows, *update) if rows.dtype == settings.dtype else rows + update[0] @ update[1]
    return _Forward(output, logits, expert_indices, inputs, hidden, weights)


def _dropped(inputs: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    return inputs if kept is None else torch.where(kept.reshape(inputs.shape), inputs, 0.0)


def _gate(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every expert's part of `hidden: (N, E*r)` times its weight."""
    per_expert = hidden.unflatten(1, (weights.shape[1], -1))
    return (per_expert * weights.to(hidden.dtype).unsqueeze(-1)).flatten(1)


class _AddMixture(torch.autograd.Function):
    """`_forward` and its gradient."""

    @staticmethod
    def forward(ctx, result, weight, bias, x, experts_A, experts_B, router, kept, settings):
        """See `add_mixture`."""
        done = _forward(result, weight, bias, x, experts_A, experts_B, router, kept, settings)
        ctx.mark_non_differentiable(done.expert_indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(done.inputs, done.hidden, done.weights, weight, experts_A, experts_B, router, kept)
        ctx.settings, ctx.x_shape, ctx.x_dtype = settings, x.shape, x.dtype
        ctx.result_shape = None if result is None else result.shape
        return done.output, done.logits, done.expert_indices

    @staticmethod
    def backward(ctx, grad_output, grad_logits, _):
        """With `t = dy B^T`, weights `w = scaling * g` and per expert `u = <t, h>`:

        dh = w t,   dB = (w h)^T dy,   dz = w (u - sum_e g_e u_e)    (the softmax over the chosen)
        """
        if torch.is_grad_enabled():  # only under create_graph; a gradient of this one would be wrong in silence
            raise MolaError(
                "second derivatives through a mixture of experts are not supported: leave out `create_graph=True`."
            )
        inputs, hidden, weights, weight, experts_A, experts_B, router, kept = ctx.saved_tensors
        _, _, _, wants_x, wants_A, wants_B, wants_router, *_ = ctx.needs_input_grad
        grad_B = grad_hidden = grad_x = None
        if grad_output is not None:
            rows = grad_output.to(ctx.settings.dtype)
            grad_hidden, grad_chosen = _through_gates(rows, hidden, weights, experts_B, ctx.settings.scaling)
            grad_logits = grad_chosen if grad_logits is None else grad_chosen + grad_logits
            if wants_B:
                grad_B = (_gate(hidden, weights).t() @ rows).view(experts_B.shape).to(experts_B.dtype)
            if wants_x and weight is not None:
                grad_x = rows @ weight
        grad_A = grad_router = None
        if grad_hidden is not None:
            if wants_A:
                grad_A = (grad_hidden.t() @ _dropped(inputs, kept)).view(experts_A.shape).to(experts_A.dtype)
            if wants_x:
                grad_x = _add_product(grad_x, grad_hidden, experts_A.flatten(0, 1), kept)
        if grad_logits is not None:
            grad_logits = grad_logits.to(inputs.dtype)
            if wants_router:
                grad_router = (grad_logits.t() @ inputs).to(router.dtype)
            if wants_x:
                grad_x = _add_product(grad_x, grad_logits, router, None)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        grad_result = None
        if weight is None and grad_output is not None:
            grad_result = grad_output.reshape(ctx.result_shape)
        return grad_result, None, None, grad_x, grad_A, grad_B, grad_router, None, None


def _through_gates(rows, hidden, weights, experts_B, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `hidden: (N, E*r)` and of the router logits `(N, E)`, from `dy: (N, out)`."""
    through_B = rows @ experts_B.flatten(0, 1).to(rows.dtype).t()  # (N, E*r)
    agreement = (through_B * hidden).unflatten(1, (weights.shape[1], -1)).sum(-1, dtype=weights.dtype)
    # Of experts that were not chosen the weight is 0, and so is the gradient.
    mean = (weights * agreement).sum(-1, keepdim=True) / scaling
    return _gate(through_B, weights), weights * (agreement - mean)


def _add_product(total: torch.Tensor | None, rows, matrix, kept: torch.Tensor | None) -> torch.Tensor:
    """`total + kept * (rows @ matrix)`, in place where there is a total."""
    matrix = matrix.to(rows.dtype)
    if total is None:
        return _dropped(rows @ matrix, kept)
    return total.addmm_(rows, matrix) if kept is None else total.add_(_dropped(rows @ matrix, kept))

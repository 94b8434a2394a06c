"""The update of a mixture of experts, with its backward pass written out.

- All experts at once: A is one `(E*r, in)` matrix, B one `(E*r, out)`; gates act between them, in rank space.
- Tensors of rank size have tokens last: operators over experts then run along memory, and the router's thin product
  is twice as fast.
- Kept for the backward pass: the input, which other linears that read it keep too, and tensors of rank size.
- The update is added to the base output by the product itself; no tensor of output size is made for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mola.tuner.chosen import AddChosen, compute_chosen, kernel_for
from mola.tuner.dropout import drop
from mola.tuner.few_tokens import compute_few, is_few
from mola.tuner.gates import apply_gates, through_gates
from mola.tuner.pieces import as_rows, refuse_second_derivatives
from mola.tuner.products import add_product, base_output, linear_plus, product, wants_onednn
from mola.tuner.sparse import AddSparseMixture, compute_sparse, pays


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
        logits: router logits, float32 `(E, N)`, with gradient.
        expert_indices: chosen experts, `(top_k, N)`, in any order.
    """

    output: torch.Tensor
    logits: torch.Tensor
    expert_indices: torch.Tensor


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
        kept: what dropout keeps of the experts' input, see `mola.tuner.dropout`; None without dropout.
        settings: see `MixtureSettings`.

    Returns:
        The output and what the router said; gradients are defined once, not twice.

    Source: paper, section 3.1.
    """
    result, weight, bias = (None, *base) if isinstance(base, FrozenLinear) else (base, None, None)
    arguments = result, weight, bias, x, experts_A, experts_B, router, kept, settings
    if kept is None and not torch.is_grad_enabled() and is_few(x):
        return Mixture(*compute_few(result, weight, bias, x, experts_A, experts_B, router, settings))
    kernel = kernel_for(x, experts_A, experts_B, router, settings)
    if kernel is not None:
        return Mixture(*(AddChosen.apply if torch.is_grad_enabled() else compute_chosen)(kernel, *arguments)[:3])
    if pays(x, experts_A, experts_B, settings):
        return Mixture(*(AddSparseMixture.apply if torch.is_grad_enabled() else compute_sparse)(*arguments)[:3])
    return Mixture(*(_AddMixture.apply if torch.is_grad_enabled() else _forward)(*arguments)[:3])


class _Forward(NamedTuple):
    output: torch.Tensor  # (..., out); not a view, for some models change it in place
    logits: torch.Tensor  # (E, N)
    expert_indices: torch.Tensor
    inputs: torch.Tensor  # (..., in), in the format of the products
    gated: torch.Tensor  # (E*r, N): what A gives, times gates and scaling
    weights: torch.Tensor  # gates times scaling, float32 (E, N)
    # A over router, (E*r + E, in), and B, (E*r, out), where these had to be cast for the products. The backward pass
    # needs them again, and adapters are too large to stay in a cache until then.
    copies: tuple[torch.Tensor | None, torch.Tensor | None]


def _forward(result, weight, bias, x, experts_A, experts_B, router, kept, settings: MixtureSettings) -> _Forward:
    inputs = x.to(settings.dtype)
    joined = None if experts_A.dtype == settings.dtype else _join(experts_A, router, settings.dtype)
    matrix_A = experts_A.flatten(0, 1) if joined is None else joined[: -len(router)]
    matrix_B = experts_B.flatten(0, 1).to(settings.dtype)
    gated = product(matrix_A, drop(as_rows(inputs), kept).t())
    gates = apply_gates(as_rows(x), router, gated, settings.top_k, settings.scaling)
    if weight is not None and wants_onednn(inputs, weight):  # which adds to a wide product for less than to a thin one
        rows = linear_plus(as_rows(inputs), weight, bias, product(gated.t(), matrix_B))
        output = torch.ops.aten._unsafe_view(rows, [*inputs.shape[:-1], len(weight)])
    else:
        output = base_output(result, weight, bias, inputs)
        add_product(output.view(-1, output.shape[-1]), gated.t(), matrix_B)
    copies = joined, None if joined is None else matrix_B
    return _Forward(output, gates.logits, gates.expert_indices, inputs, gated, gates.weights, copies)


def _join(experts_A: torch.Tensor, router: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A and router, one below the other, in the format of the products: `(E*r + E, in)`."""
    matrix_A = experts_A.flatten(0, 1)
    shape = len(matrix_A) + len(router), matrix_A.shape[1]
    return torch.cat((matrix_A, router), out=torch.empty(shape, dtype=dtype, device=router.device))


class _AddMixture(torch.autograd.Function):
    """`_forward` and its gradient."""

    @staticmethod
    def forward(ctx, result, weight, bias, x, experts_A, experts_B, router, kept, settings):
        """See `add_mixture`."""
        done = _forward(result, weight, bias, x, experts_A, experts_B, router, kept, settings)
        ctx.mark_non_differentiable(done.expert_indices)
        ctx.set_materialize_grads(False)
        tensors = done.inputs, done.gated, done.weights, weight, experts_A, experts_B, router, kept
        ctx.save_for_backward(*tensors, *done.copies)
        ctx.settings, ctx.x_dtype, ctx.result_dtype = settings, x.dtype, None if result is None else result.dtype
        return done.output, done.logits, done.expert_indices

    @staticmethod
    def backward(ctx, grad_output, grad_logits, _):
        """With `a` what the gates gave: `dB = a dy^T`, and through the gates (`mola.tuner.gates`) from `t = B dy`."""
        refuse_second_derivatives()
        inputs, gated, weights, weight, experts_A, experts_B, router, kept, joined, matrix_B = ctx.saved_tensors
        _, _, _, wants_x, wants_A, wants_B, wants_router, *_ = ctx.needs_input_grad
        if grad_output is None:
            grad_output = inputs.new_zeros(*inputs.shape[:-1], experts_B.shape[2])
        rows = as_rows(grad_output).to(ctx.settings.dtype)
        through_B = product(experts_B.flatten(0, 1) if matrix_B is None else matrix_B, rows.t())
        inner = through_gates(through_B, gated, weights, grad_logits, ctx.settings.scaling)
        grad_x = grad_A = grad_B = grad_router = None
        if wants_B:
            grad_B = product(gated, rows).view(experts_B.shape).to(experts_B.dtype)
        if wants_A or wants_router:
            grad_A, grad_router = _weight_gradients(inner, as_rows(inputs), experts_A, router, kept)
        if wants_x:
            joined = _join(experts_A, router, rows.dtype) if joined is None else joined
            if weight is not None and wants_onednn(rows, weight):
                grad_x = _input_gradient(None, inner, joined, len(router), kept)
                grad_x = linear_plus(rows, weight.t(), None, grad_x)
            else:
                base = None if weight is None else rows @ weight
                grad_x = _input_gradient(base, inner, joined, len(router), kept)
            grad_x = grad_x.view(inputs.shape).to(ctx.x_dtype)
        grad_result = grad_output.to(ctx.result_dtype) if weight is None else None
        return grad_result, None, None, grad_x, grad_A, grad_B, grad_router, None, None


def _weight_gradients(inner, inputs, experts_A, router, kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of A and router; without dropout both read the same input, in one product."""
    num_experts = len(router)
    if kept is None:
        both = product(inner, inputs).to(experts_A.dtype)
        grad_A, grad_router = both[:-num_experts], both[-num_experts:]
    else:
        grad_A = product(inner[:-num_experts], drop(inputs, kept)).to(experts_A.dtype)
        grad_router = product(inner[-num_experts:], inputs)
    return grad_A.view(experts_A.shape), grad_router.to(router.dtype)


def _input_gradient(total: torch.Tensor | None, inner, joined, num_experts: int, kept) -> torch.Tensor:
    """Add what comes through A and the router to `total`, in place where there is one."""
    if kept is None:
        return product(inner.t(), joined) if total is None else add_product(total, inner.t(), joined)
    through_A = drop(product(inner[:-num_experts].t(), joined[:-num_experts]), kept)
    total = through_A if total is None else total.add_(through_A)
    return add_product(total, inner[-num_experts:].t(), joined[-num_experts:])

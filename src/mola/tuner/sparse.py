"""The update of a mixture of many experts: every token visits its chosen experts only.

Assignments of tokens to experts are sorted by expert, and each expert multiplies its own rows in one grouped product.
Arithmetic then does not grow with the number of experts, which pays for sorting, gathering and adding back where
experts are many and products are slow: in float32 on the CPU, see `pays`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from mola.tuner.dropout import drop
from mola.tuner.pieces import as_rows, refuse_second_derivatives
from mola.tuner.products import base_output, onednn_is_faster, product
from mola.tuner.routing import largest_logits, logits_by_expert

if TYPE_CHECKING:
    from mola.tuner.mixture import MixtureSettings

# Of 2 per token, with SmolLM2's shapes and 512 tokens: by MKL 16 take less time this way than all do, and 8 more. Where
# oneDNN makes the products of all, in half the time, that is so for 24 and 16.
_FROM_EXPERTS, _FROM_EXPERTS_ONEDNN = 16, 24


def pays(x: torch.Tensor, experts_A: torch.Tensor, experts_B: torch.Tensor, settings: MixtureSettings) -> bool:
    """Whether products of chosen experts only are possible, and faster than products of all."""
    num_experts, r, _ = experts_A.shape
    least = _FROM_EXPERTS_ONEDNN if onednn_is_faster() else _FROM_EXPERTS
    return (
        x.is_cpu
        and settings.dtype == torch.float32
        and 2 * num_experts >= least * settings.top_k
        and x.numel() >= num_experts * x.shape[-1]
        and (r | experts_A.shape[2] | experts_B.shape[2]) % 4 == 0  # grouped products want rows of whole 16 bytes
    )


class Assignments(NamedTuple):
    """Which token visits which expert, sorted by expert; `M = top_k * N` of them.

    Attributes:
        tokens: token of each, `(M,)`.
        order: place of each in the flattened `(top_k, N)`.
        ends: where the assignments of each expert end, int32 `(E,)`.
        experts: expert of each, in the order of `(top_k, N)`.
    """

    tokens: torch.Tensor
    order: torch.Tensor
    ends: torch.Tensor
    experts: torch.Tensor


def assign(logits: torch.Tensor, top_k: int) -> tuple[Assignments, torch.Tensor]:
    """Choose experts for `logits: (E, N)`; assignments, and gates `(top_k, N)`."""
    num_experts, num_tokens = logits.shape
    largest, experts = largest_logits(logits, top_k, dim=0)
    order = experts.flatten().argsort(stable=True)
    ends = torch.bincount(experts.flatten(), minlength=num_experts).cumsum(0).to(torch.int32)
    return Assignments(order % max(num_tokens, 1), order, ends, experts), torch.softmax(largest, dim=0)


def compute_sparse(result, weight, bias, x, experts_A, experts_B, router, kept, settings):
    """The computation of `add_mixture` over chosen experts: its three results, then what its gradient needs."""
    inputs = x.to(settings.dtype)
    logits = logits_by_expert(as_rows(x), router)
    assigned, gates = assign(logits, settings.top_k)
    weights = gates.mul_(settings.scaling).flatten().index_select(0, assigned.order)  # (M,)
    rows = drop(as_rows(inputs), kept).index_select(0, assigned.tokens)
    gated = F.grouped_mm(rows, experts_A.to(settings.dtype).transpose(1, 2), offs=assigned.ends)  # (M, r)
    gated.mul_(weights.unsqueeze(1))
    output = base_output(result, weight, bias, inputs)
    _add_products(output.view(-1, output.shape[-1]), gated, experts_B.to(settings.dtype), assigned)
    return output, logits, assigned.experts, inputs, gated, weights, assigned


def _add_products(total: torch.Tensor, rows: torch.Tensor, matrices: torch.Tensor, assigned: Assignments) -> None:
    """Add `rows_a M_e` to the token of every assignment: `rows: (M, r)`, `matrices: (E, r, out)`, `total: (N, out)`."""
    products = F.grouped_mm(rows, matrices, offs=assigned.ends)
    total.index_add_(0, assigned.tokens, products.to(total.dtype))


class AddSparseMixture(torch.autograd.Function):
    """`compute_sparse` and its gradient."""

    @staticmethod
    def forward(ctx, result, weight, bias, x, experts_A, experts_B, router, kept, settings):
        """See `add_mixture`."""
        arguments = result, weight, bias, x, experts_A, experts_B, router, kept, settings
        output, logits, experts, inputs, gated, weights, assigned = compute_sparse(*arguments)
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs, gated, weights, *assigned, weight, experts_A, experts_B, router, kept)
        ctx.settings, ctx.x_dtype, ctx.result_dtype = settings, x.dtype, None if result is None else result.dtype
        return output, logits, experts

    @staticmethod
    def backward(ctx, grad_output, grad_logits, _):
        """As in `mola.tuner.mixture`, with one row for every assignment in place of zeros for other experts."""
        refuse_second_derivatives()
        inputs, gated, weights, *assigned, weight, experts_A, experts_B, router, kept = ctx.saved_tensors
        assigned, dtype = Assignments(*assigned), ctx.settings.dtype
        _, _, _, wants_x, wants_A, wants_B, wants_router, *_ = ctx.needs_input_grad
        if grad_output is None:
            grad_output = inputs.new_zeros(*inputs.shape[:-1], experts_B.shape[2])
        rows = as_rows(grad_output).to(dtype)
        visiting = rows.index_select(0, assigned.tokens)  # (M, out)
        grad_hidden = F.grouped_mm(visiting, experts_B.to(dtype).transpose(1, 2), offs=assigned.ends)  # (M, r)
        grad_chosen = _through_softmax((grad_hidden * gated).sum(1), weights, assigned, ctx.settings.scaling)
        if grad_logits is None:
            grad_logits = grad_chosen.new_zeros(router.shape[0], rows.shape[0])
        grad_logits = grad_logits.scatter_add(0, assigned.experts, grad_chosen).to(dtype)
        grad_hidden.mul_(weights.unsqueeze(1))
        grad_x = grad_A = grad_B = grad_router = None
        if wants_B:
            grad_B = F.grouped_mm(gated.t(), visiting, offs=assigned.ends).to(experts_B.dtype)
        if wants_A:
            read = drop(as_rows(inputs), kept).index_select(0, assigned.tokens)
            grad_A = F.grouped_mm(grad_hidden.t(), read, offs=assigned.ends).to(experts_A.dtype)
        if wants_router:
            grad_router = (grad_logits @ as_rows(inputs)).to(router.dtype)
        if wants_x:
            total = torch.zeros_like(as_rows(inputs)) if weight is None else product(rows, weight)
            through_A = total if kept is None else torch.zeros_like(total)
            _add_products(through_A, grad_hidden, experts_A.to(dtype), assigned)
            if kept is not None:
                total.add_(drop(through_A, kept))
            grad_x = total.addmm_(grad_logits.t(), router.to(dtype)).view(inputs.shape).to(ctx.x_dtype)
        grad_result = grad_output.to(ctx.result_dtype) if weight is None else None
        return grad_result, None, None, grad_x, grad_A, grad_B, grad_router, None, None


def _through_softmax(agreement, weights, assigned: Assignments, scaling: float) -> torch.Tensor:
    """Gradient of the chosen logits, `(top_k, N)`, from `v_a: (M,)` in the order of assignments."""
    shape = assigned.experts.shape
    agreement, weights = (
        torch.empty_like(values).index_copy_(0, assigned.order, values).view(shape) for values in (agreement, weights)
    )
    return torch.addcmul(agreement, weights, agreement.sum(0, keepdim=True), value=-1.0 / scaling)

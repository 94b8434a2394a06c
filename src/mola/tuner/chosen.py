"""The update of a mixture on the CPU from chosen experts only, natively: the extra `cpu`.

One native function forward and one backward (`mola.tuner.native_chosen`) in place of products over all experts. They
use one thread, so they pay where one thread with the chosen experts has less to do than each of all threads has with
all of them; and where processor, formats and sizes are what they were written for, see `kernel_for`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mola.tuner.dropout import drop
from mola.tuner.pieces import as_rows, have_addresses, import_native, refuse_second_derivatives
from mola.tuner.products import add_product, base_output, product

if TYPE_CHECKING:
    from mola.tuner.mixture import MixtureSettings

_NATIVE = "mola.tuner.native_chosen"
_COLUMNS = 32  # of which the native functions want multiples


def kernel_for(x, experts_A, experts_B, router, settings: MixtureSettings) -> Any:
    """The native function that computes this mixture, forward; None where it is not possible or does not pay."""
    num_experts, r, in_features = experts_A.shape
    if 0 in x.shape or settings.top_k * torch.get_num_threads() > num_experts or (in_features | experts_B.shape[2]) % _COLUMNS:
        return None
    if router.dtype is not torch.float32 or experts_A.dtype is not experts_B.dtype:
        return None
    if not have_addresses(x, experts_A, experts_B, router):
        return None
    native = import_native(_NATIVE)
    return None if native is None else native.forward_kernel(x.dtype, settings.dtype, experts_A.dtype, r)


def compute_chosen(kernel, result, weight, bias, x, experts_A, experts_B, router, kept, settings):
    """The computation of `add_mixture` over chosen experts: its three results, then what its gradient needs."""
    (num_experts, r, in_features), top_k = experts_A.shape, settings.top_k
    inputs = x.to(settings.dtype)
    tokens, rows = as_rows(x).contiguous(), drop(as_rows(inputs), kept).contiguous()
    num_tokens = len(rows)
    output = base_output(result, weight, bias, inputs)
    total = output if output.dtype is settings.dtype else torch.zeros_like(output, dtype=settings.dtype)
    logits = torch.empty((num_experts, num_tokens), dtype=torch.float32)
    weights = torch.empty((top_k, num_tokens), dtype=torch.float32)
    expert_indices = torch.empty((top_k, num_tokens), dtype=torch.int64)
    padded = r if settings.dtype is torch.float32 else r + r % 2
    gated = torch.empty((num_tokens, top_k * padded), dtype=settings.dtype)
    experts_A, experts_B, router = experts_A.contiguous(), experts_B.contiguous(), router.contiguous()
    tensors = tokens, rows, router, experts_A, experts_B, total, logits, weights, expert_indices, gated
    addresses = [tensor.data_ptr() for tensor in tensors]
    kernel(*addresses, num_tokens, in_features, experts_B.shape[2], num_experts, top_k, settings.scaling)
    if total is not output:
        output.add_(total)
    return output, logits, expert_indices, inputs, gated, weights


class AddChosen(torch.autograd.Function):
    """`compute_chosen` and its gradient."""

    @staticmethod
    def forward(ctx, kernel, result, weight, bias, x, experts_A, experts_B, router, kept, settings):
        """See `add_mixture`."""
        arguments = kernel, result, weight, bias, x, experts_A, experts_B, router, kept, settings
        output, logits, expert_indices, inputs, gated, weights = compute_chosen(*arguments)
        ctx.mark_non_differentiable(expert_indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs, gated, weights, expert_indices, weight, experts_A, experts_B, router, kept)
        ctx.settings, ctx.x_dtype, ctx.result_dtype = settings, x.dtype, None if result is None else result.dtype
        return output, logits, expert_indices

    @staticmethod
    def backward(ctx, grad_output, grad_logits, _):
        """As in `mola.tuner.mixture`, from the rows of chosen experts."""
        refuse_second_derivatives()
        inputs, gated, weights, expert_indices, weight, experts_A, experts_B, router, kept = ctx.saved_tensors
        dtype, scaling = ctx.settings.dtype, ctx.settings.scaling
        _, _, _, _, wants_x, wants_A, wants_B, wants_router, *_ = ctx.needs_input_grad
        if grad_output is None:
            grad_output = inputs.new_zeros(*inputs.shape[:-1], experts_B.shape[2])
        dy, tokens = as_rows(grad_output).to(dtype).contiguous(), as_rows(inputs)
        rows = drop(tokens, kept).contiguous()
        num_experts, r, in_features = experts_A.shape
        joint = kept is None and grad_logits is None
        base = product(dy, weight) if wants_x and weight is not None else None
        total = base if kept is None or not wants_x else None
        if wants_x and total is None:
            total = torch.zeros_like(tokens, memory_format=torch.contiguous_format)
        wants_A = wants_A or wants_router
        grad_A = torch.empty(experts_A.shape, dtype=torch.float32) if wants_A else None
        grad_router = torch.empty(router.shape, dtype=torch.float32) if wants_A else None
        grad_B = torch.empty(experts_B.shape, dtype=torch.float32) if wants_B else None
        inner = None if joint else torch.empty((num_experts, len(rows)), dtype=dtype)
        asked = None if grad_logits is None else grad_logits.to(torch.float32).contiguous()
        matrices = experts_A.contiguous(), experts_B.contiguous(), router.contiguous()
        known = dy, rows, gated, weights, expert_indices, asked, *matrices
        addresses = [0 if each is None else each.data_ptr() for each in (*known, total, grad_A, grad_B, grad_router, inner)]
        kernel = import_native(_NATIVE).backward_kernel(dtype, experts_A.dtype, r, joint)
        kernel(*addresses, len(rows), in_features, experts_B.shape[2], num_experts, ctx.settings.top_k, scaling)
        if kept is not None and total is not None:
            total = drop(total, kept) if base is None else base.add_(drop(total, kept))
        if inner is not None:
            grad_router = product(inner, tokens) if wants_router else None
            total = None if total is None else add_product(total, inner.t(), router.to(dtype))
        grad_x = None if total is None else total.view(inputs.shape).to(ctx.x_dtype)
        grad_A, grad_B = (
            None if each is None else each.to(experts.dtype) for each, experts in ((grad_A, experts_A), (grad_B, experts_B))
        )
        grad_router = None if grad_router is None else grad_router.to(router.dtype)
        grad_result = grad_output.to(ctx.result_dtype) if weight is None else None
        return None, grad_result, None, None, grad_x, grad_A, grad_B, grad_router, None, None

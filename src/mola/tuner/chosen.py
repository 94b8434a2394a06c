"""The update of a mixture on the CPU from chosen experts only, natively: the extra `cpu`.

One native function forward and one backward (`mola.tuner.native_chosen`) in place of products over all experts. They
use one thread, so they pay where one thread has no more to do with chosen experts than each of all threads with all of
them; and processor, number formats and sizes must be what they were written for, see `kernel_for`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mola.tuner.dropout import drop
from mola.tuner.pieces import as_rows, have_addresses, import_native, refuse_second_derivatives
from mola.tuner.products import add_product, base_output, product

if TYPE_CHECKING:
    from mola.tuner.mixture import MixtureSettings

_NATIVE = "mola.tuner.native_chosen"
_COLUMNS = 32  # of which the native functions want multiples


def kernel_for(
    x: torch.Tensor,
    experts_A: torch.Tensor,
    experts_B: torch.Tensor,
    router: torch.Tensor,
    settings: MixtureSettings,
) -> Any:
    """The native function that computes a mixture; None where there is none for it, or where it does not pay."""
    num_experts, r, in_features = experts_A.shape
    if settings.top_k * torch.get_num_threads() > num_experts or (in_features | experts_B.shape[2]) % _COLUMNS:
        return None
    if router.dtype is not torch.float32 or experts_A.dtype is not experts_B.dtype or x.numel() == 0:
        return None
    if (
        x.shape[-1] != in_features
        or experts_B.shape[:2] != (num_experts, r)
        or router.shape != (num_experts, in_features)
    ):
        return None  # operators of torch say what does not fit
    if not have_addresses(x, experts_A, experts_B, router):
        return None
    native = import_native(_NATIVE)
    return None if native is None else native.forward_kernel(x.dtype, settings.dtype, experts_A.dtype, r)


def compute_chosen(kernel, result, weight, bias, x, experts_A, experts_B, router, kept, settings):
    """The computation of `add_mixture` over chosen experts: its three results, then what its gradient needs."""
    (num_experts, r, in_features), top_k, dtype = experts_A.shape, settings.top_k, settings.dtype
    inputs = x.to(dtype)
    tokens, rows = as_rows(x).contiguous(), drop(as_rows(inputs), kept).contiguous()
    num_tokens = len(rows)
    output = base_output(result, weight, bias, inputs)
    if output.shape != (*x.shape[:-1], experts_B.shape[2]):
        raise ValueError(f"The base layer's output has shape {tuple(output.shape)}, input {tuple(x.shape)}.")
    total = output if output.dtype is dtype else torch.zeros_like(output, dtype=dtype)
    logits, weights = (torch.empty((size, num_tokens), dtype=torch.float32) for size in (num_experts, top_k))
    expert_indices = torch.empty((top_k, num_tokens), dtype=torch.int64)
    padded = r if dtype is torch.float32 else r + r % 2
    gated = torch.empty((num_tokens, top_k * padded), dtype=dtype)
    matrices = router.contiguous(), experts_A.contiguous(), experts_B.contiguous()
    tensors = tokens, rows, *matrices, total, logits, weights, expert_indices, gated
    addresses = [tensor.data_ptr() for tensor in tensors]
    kernel(*addresses, num_tokens, in_features, experts_B.shape[2], num_experts, top_k, settings.scaling)
    if total is not output:
        output.add_(total)
    return output, logits, expert_indices, inputs, gated, weights


class _Saved(NamedTuple):
    inputs: torch.Tensor  # (..., in), in the format of the products
    gated: torch.Tensor  # (N, top_k * r), r made even in bfloat16: what A gives, times gates and scaling
    weights: torch.Tensor  # gates times scaling, float32 (top_k, N)
    expert_indices: torch.Tensor
    weight: torch.Tensor | None
    experts_a: torch.Tensor
    experts_b: torch.Tensor
    router: torch.Tensor
    kept: torch.Tensor | None


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
        saved = _Saved(*ctx.saved_tensors)
        _, _, _, _, wants_x, wants_A, wants_B, wants_router, *_ = ctx.needs_input_grad
        if grad_output is None:
            grad_output = saved.inputs.new_zeros(*saved.inputs.shape[:-1], saved.experts_b.shape[2])
        dy = as_rows(grad_output).to(ctx.settings.dtype).contiguous()
        base = product(dy, saved.weight) if wants_x and saved.weight is not None else None
        total = base  # to which the experts' part is added; what comes through dropout has a place of its own
        if wants_x and (base is None or saved.kept is not None):
            total = torch.zeros_like(as_rows(saved.inputs), memory_format=torch.contiguous_format)
        wanted = wants_A or wants_router, wants_B
        grad_A, grad_B, grad_router, inner = _native_gradients(saved, dy, grad_logits, total, wanted, ctx.settings)
        if total is not None and saved.kept is not None:
            total = drop(total, saved.kept) if base is None else base.add_(drop(total, saved.kept))
        if inner is not None:  # the router's part, which is not in the native function's
            grad_router = product(inner, as_rows(saved.inputs)) if wants_router else None
            total = None if total is None else add_product(total, inner.t(), saved.router.to(dy.dtype))
        grad_x = None if total is None else total.view(saved.inputs.shape).to(ctx.x_dtype)
        found = grad_A if wants_A else None, grad_B, grad_router if wants_router else None
        parameters = saved.experts_a, saved.experts_b, saved.router
        grads = [None if one is None else one.to(it.dtype) for one, it in zip(found, parameters, strict=True)]
        grad_result = grad_output.to(ctx.result_dtype) if saved.weight is None else None
        return None, grad_result, None, None, grad_x, *grads, None, None


def _native_gradients(saved: _Saved, dy, grad_logits, total, wanted: tuple[bool, bool], settings: MixtureSettings):
    """Gradients of A, B and router, in float32, and of the logits, in the format of the products; add to `total`.

    The gradient of the logits is None where that of the router and its part of `total` were made with A's: without
    dropout both read the same input.
    """
    (num_experts, r, in_features), out_features = saved.experts_a.shape, saved.experts_b.shape[2]
    rows = drop(as_rows(saved.inputs), saved.kept).contiguous()
    joint = saved.kept is None and grad_logits is None
    wants_A, wants_B = wanted
    grad_A, grad_B, grad_router = (
        torch.empty(shape, dtype=torch.float32) if wants else None
        for shape, wants in (
            (saved.experts_a.shape, wants_A),
            (saved.experts_b.shape, wants_B),
            (saved.router.shape, wants_A and joint),
        )
    )
    inner = None if joint else torch.empty((num_experts, len(rows)), dtype=settings.dtype)
    asked = None if grad_logits is None else grad_logits.to(torch.float32).contiguous()
    matrices = saved.experts_a.contiguous(), saved.experts_b.contiguous(), saved.router.contiguous()
    known = dy, rows, saved.gated, saved.weights, saved.expert_indices, asked, *matrices
    tensors = *known, total, grad_A, grad_B, grad_router, inner
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    kernel = import_native(_NATIVE).backward_kernel(settings.dtype, saved.experts_a.dtype, r, joint)
    kernel(*addresses, len(rows), in_features, out_features, num_experts, settings.top_k, settings.scaling)
    return grad_A, grad_B, grad_router, inner

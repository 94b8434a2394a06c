"""Training on a CPU with the chosen experts only: one native function for each pass, see `jit_train`.

The native functions use one thread, so they are faster as long as `top_k * threads <= num_experts`. They exist for some
processors, dtypes and sizes.
"""

from __future__ import annotations

import torch

from mola.tuner.kernels import native
from mola.tuner.kernels.api import NOT_PLAIN, OTHER_ROUTER, Backend, Grads, Mixture, MixtureInputs, Saved
from mola.tuner.kernels.dense import why_no_own_backward
from mola.tuner.kernels.dropout import drop
from mola.tuner.kernels.gemm import addmm_, base_output, mm
from mola.tuner.kernels.tensors import are_plain_cpu_tensors, as_rows
from mola.tuner.routing import DEFAULT_ROUTER

_FUNCTIONS = "jit_train"
_COLUMNS = 32  # the native functions need features in multiples of this


class CpuTrain(Backend):
    """Computes the chosen experts only, in native functions, and their gradients."""

    name = "cpu_train"
    device_type = "cpu"

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """None for sizes in multiples of 32, plain tensors and a processor with the instructions, else the reason."""
        reason = why_no_own_backward(inputs)
        if reason is not None:
            return reason
        x, router, settings = inputs.x, inputs.router, inputs.settings
        experts_A, experts_B = inputs.experts_A, inputs.experts_B
        if (experts_A.shape[2] | experts_B.shape[2]) % _COLUMNS or x.numel() == 0:
            return f"needs features in multiples of {_COLUMNS}, and at least one token"
        if settings.router != DEFAULT_ROUTER or router.dtype is not torch.float32:
            return OTHER_ROUTER
        if experts_A.dtype is not experts_B.dtype or not _shapes_fit(x, experts_A, experts_B, router):
            return "shapes or dtypes of x, A, B and router do not fit"  # torch then raises its own error
        if not are_plain_cpu_tensors(x, experts_A, experts_B, router):
            return NOT_PLAIN
        functions = native.load(_FUNCTIONS)
        if functions is None or not functions.has_kernels(x.dtype, settings.dtype, experts_A.dtype):
            return f"no native function for {settings.dtype}, or no numba or no AVX-512 (for bfloat16 its BF16) here"
        return None

    def why_slower(self, inputs: MixtureInputs) -> str | None:
        """None, or the reason: with many threads, each has less to do if they share the work of all experts."""
        if inputs.settings.top_k * torch.get_num_threads() > len(inputs.experts_A):
            return "slower than dense with so many threads: top_k * threads > num_experts"
        return None

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, Saved]:
        """Call the native function with the addresses of all tensors; it adds the update to the base output."""
        settings, top_k, dtype = inputs.settings, inputs.settings.top_k, inputs.settings.dtype
        num_experts, r, in_features = inputs.experts_A.shape
        out_features = inputs.experts_B.shape[2]
        x = inputs.x.to(dtype)
        tokens, rows = as_rows(inputs.x).contiguous(), drop(as_rows(x), inputs.dropout_mask).contiguous()
        num_tokens = len(rows)
        output = base_output(inputs, x)
        if output.shape != (*x.shape[:-1], out_features):
            raise ValueError(f"The base layer's output has shape {tuple(output.shape)}, input {tuple(x.shape)}.")
        total = output if output.dtype is dtype else torch.zeros_like(output, dtype=dtype)
        logits, weights = (
            torch.empty((size, num_tokens), dtype=torch.float32, device="cpu") for size in (num_experts, top_k)
        )
        expert_indices = torch.empty((top_k, num_tokens), dtype=torch.int64, device="cpu")
        # The gated output of A; in bfloat16 its rank is rounded up to an even number.
        padded = r if dtype is torch.float32 else r + r % 2
        gated = torch.empty((num_tokens, top_k * padded), dtype=dtype, device="cpu")
        matrices = inputs.router.contiguous(), inputs.experts_A.contiguous(), inputs.experts_B.contiguous()
        tensors = tokens, rows, *matrices, total, logits, weights, expert_indices, gated
        addresses = [tensor.data_ptr() for tensor in tensors]
        kernel = native.load(_FUNCTIONS).forward_kernel(inputs.x.dtype, dtype, inputs.experts_A.dtype, r)
        kernel(*addresses, num_tokens, in_features, out_features, num_experts, top_k, settings.scaling)
        if total is not output:
            output.add_(total)
        return Mixture(output, logits, expert_indices), Saved(x, (gated, weights, expert_indices))

    def backward(self, inputs: MixtureInputs, saved, grad_output, grad_logits, wanted: Grads) -> Grads:
        """Like `Dense.backward`, from the rows of the chosen experts."""
        x, weight, dropout_mask = as_rows(inputs.x), inputs.weight, inputs.dropout_mask
        dy = as_rows(grad_output).to(inputs.settings.dtype).contiguous()
        base = mm(dy, weight) if wanted.x and weight is not None else None
        total = base  # the experts' gradient is added to it; with dropout it needs a tensor of its own
        if wanted.x and (base is None or dropout_mask is not None):
            total = torch.zeros_like(x, memory_format=torch.contiguous_format)
        grad_A, grad_B, grad_router, inner_logits = _native_gradients(inputs, saved, dy, grad_logits, total, wanted)
        if total is not None and dropout_mask is not None:
            total = drop(total, dropout_mask) if base is None else base.add_(drop(total, dropout_mask))
        if inner_logits is not None:  # the native function did not compute the router's part
            grad_router = mm(inner_logits, x) if wanted.router else None
            total = None if total is None else addmm_(total, inner_logits.t(), inputs.router.to(dy.dtype))
        return Grads(total, grad_A if wanted.experts_A else None, grad_B, grad_router if wanted.router else None)


def _shapes_fit(x: torch.Tensor, experts_A: torch.Tensor, experts_B: torch.Tensor, router: torch.Tensor) -> bool:
    num_experts, r, in_features = experts_A.shape
    return (
        x.shape[-1] == in_features
        and experts_B.shape[:2] == (num_experts, r)
        and router.shape == (num_experts, in_features)
    )


def _native_gradients(inputs: MixtureInputs, saved, dy, grad_logits, total, wanted: Grads):
    """Compute the gradients of A, B and router, in float32, and add the input's gradient to `total`.

    With dropout or router losses, the router's part is missing from both. The last returned value is then the gradient
    of the logits, in the dtype of the products, from which the caller computes that part; otherwise it is None.
    """
    settings = inputs.settings
    (num_experts, r, in_features), out_features = inputs.experts_A.shape, inputs.experts_B.shape[2]
    rows = drop(as_rows(inputs.x), inputs.dropout_mask).contiguous()
    joint = inputs.dropout_mask is None and grad_logits is None
    wants_A = wanted.experts_A or wanted.router
    grad_A, grad_B, grad_router = (
        torch.empty(shape, dtype=torch.float32, device="cpu") if wants else None
        for shape, wants in (
            (inputs.experts_A.shape, wants_A),
            (inputs.experts_B.shape, wanted.experts_B),
            (inputs.router.shape, wants_A and joint),
        )
    )
    inner_logits = None if joint else torch.empty((num_experts, len(rows)), dtype=settings.dtype, device="cpu")
    from_losses = None if grad_logits is None else grad_logits.to(torch.float32).contiguous()
    matrices = inputs.experts_A.contiguous(), inputs.experts_B.contiguous(), inputs.router.contiguous()
    tensors = dy, rows, *saved, from_losses, *matrices, total, grad_A, grad_B, grad_router, inner_logits
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    kernel = native.load(_FUNCTIONS).backward_kernel(settings.dtype, inputs.experts_A.dtype, r, joint)
    kernel(*addresses, len(rows), in_features, out_features, num_experts, settings.top_k, settings.scaling)
    return grad_A, grad_B, grad_router, inner_logits

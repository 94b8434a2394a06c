"""Few tokens without gradients on a CPU, as in text generation, in operators of torch.

For few tokens, calling an operator takes longer than its arithmetic, so this backend makes few calls. The
products of A, B and router are in float32 for narrower dtypes too: this is faster for few rows, and more exact.
"""

from __future__ import annotations

import torch

from mola.tuner.kernels.api import NO_ROUTER, Backend, Mixture, MixtureInputs
from mola.tuner.kernels.dense import why_no_own_backward
from mola.tuner.kernels.gemm import base_output, linear
from mola.tuner.kernels.tensors import as_rows, autocast_is_on
from mola.tuner.routing import route_dense

MAX_TOKENS = 32
MANY_TOKENS = f"slower than other backends for more than {MAX_TOKENS} tokens, or not on a CPU"


def is_decode(x: torch.Tensor) -> bool:
    """Whether `x: (..., in)` is few tokens without gradients on a CPU."""
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and 0 < x.numel() <= MAX_TOKENS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


def why_not_decode(inputs: MixtureInputs) -> str | None:
    """None if the decode backends may support the inputs, else the reason."""
    if inputs.router is None:
        return NO_ROUTER
    if torch.is_grad_enabled() or autocast_is_on(inputs.x.device.type):
        return "only without gradients and without autocast"
    return "dropout is on" if inputs.settings.dropout or inputs.dropout_mask is not None else None


class Decode(Backend):
    """Computes all experts for few tokens, in few operators of torch."""

    name = "decode"
    device_type = "cpu"

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """None for calls without gradients and dropout, else the reason."""
        return why_not_decode(inputs) or why_no_own_backward(inputs)

    def why_slower(self, inputs: MixtureInputs) -> str | None:
        """None for few tokens on a CPU, else the reason."""
        return None if is_decode(inputs.x) else MANY_TOKENS

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, None]:
        """Compute the products of A and B in float32, and add the update to a new base output."""
        settings, (num_experts, r, _) = inputs.settings, inputs.experts_A.shape
        dtype = torch.promote_types(settings.dtype, torch.float32)
        rows = as_rows(inputs.x).to(dtype)
        logits = torch.mm(rows, inputs.router.to(dtype).t())  # (N, E)
        hidden = torch.mm(rows, inputs.experts_A.flatten(0, 1).to(dtype).t())  # (N, E*r)
        gates, expert_indices = route_dense(settings.router, logits, settings.top_k, -1)
        hidden.view(-1, num_experts, r).mul_(gates.unsqueeze(-1))
        x, weight = inputs.x.to(settings.dtype), inputs.weight
        output = base_output(inputs, x) if weight is None else linear(x, weight, inputs.bias)
        total, matrix_B = output.view(-1, output.shape[-1]), inputs.experts_B.flatten(0, 1)
        if total.dtype == matrix_B.dtype == dtype:
            total.addmm_(hidden, matrix_B, alpha=settings.scaling)
        else:
            total.add_(torch.mm(hidden, matrix_B.to(dtype)), alpha=settings.scaling)
        return Mixture(output, logits.t(), expert_indices.t()), None

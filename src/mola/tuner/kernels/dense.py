"""All experts at once, in operators of torch, with a backward pass of its own.

- A is used as one `(E*r, in)` matrix, B as one `(E*r, out)` matrix. The gates multiply the `E*r` numbers between them.
- Tensors of rank size (`E*r` numbers per token) have tokens last: operators over experts then read contiguous memory,
  and the router's thin product is twice as fast.
- The backward pass needs the input, which other linears that read it keep anyway, and tensors of rank size.
- The product with B is added to the base output as it is computed; no tensor of output size is made for the update.
"""

from __future__ import annotations

import torch

from mola.tuner.kernels.api import NO_ROUTER, Backend, Grads, Mixture, MixtureInputs, Saved
from mola.tuner.kernels.dropout import drop
from mola.tuner.kernels.gates import apply_gates, gates_backward
from mola.tuner.kernels.gemm import addmm_, base_output, linear_add, mm, uses_onednn
from mola.tuner.kernels.tensors import as_rows, keeps_results
from mola.tuner.routing import DEFAULT_ROUTER


def why_no_own_backward(inputs: MixtureInputs) -> str | None:
    """None if a backend with its own backward pass may compute the inputs, else the reason.

    Inputs with a reason need a backend that autograd differentiates.
    """
    if inputs.router is None:
        return NO_ROUTER
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a compiler is given plain operators"
    if keeps_results():
        return "selective activation checkpointing keeps results, which would be changed"
    return "the router's input is jittered" if inputs.settings.jitter else None


class Dense(Backend):
    """Computes all experts for all tokens; the gates of experts that were not chosen are 0."""

    name = "dense"

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """None for all calls that may have their own backward pass, else the reason."""
        return why_no_own_backward(inputs)

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, Saved]:
        """Multiply all experts at once.

        Saves for the backward pass: the gated output of A, the gates, and any weights cast to the compute dtype.
        """
        settings, weight = inputs.settings, inputs.weight
        x = inputs.x.to(settings.dtype)
        A_and_router = None if inputs.experts_A.dtype == settings.dtype else _join_weights(inputs, settings.dtype)
        matrix_A = inputs.experts_A.flatten(0, 1) if A_and_router is None else A_and_router[: -len(inputs.router)]
        matrix_B = inputs.experts_B.flatten(0, 1).to(settings.dtype)
        gated = mm(matrix_A, drop(as_rows(x), inputs.dropout_mask).t())  # (E*r, N)
        gates = apply_gates(as_rows(inputs.x), inputs.router, gated, settings)
        # oneDNN is faster when the addition is fused into the wide base product than into the thin product with B.
        if weight is not None and uses_onednn(x, weight):
            rows = linear_add(as_rows(x), weight, inputs.bias, mm(gated.t(), matrix_B))
            output = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])
        else:
            output = base_output(inputs, x)
            addmm_(output.view(-1, output.shape[-1]), gated.t(), matrix_B)
        # Cast weights are kept: casting them again takes longer than reading them.
        cast_weights = A_and_router, None if A_and_router is None else matrix_B
        logits = None if settings.router == DEFAULT_ROUTER else gates.logits
        return Mixture(output, gates.logits, gates.expert_indices), Saved(
            x, (gated, gates.weights, logits, *cast_weights)
        )

    def backward(self, inputs: MixtureInputs, saved, grad_output, grad_logits, wanted: Grads) -> Grads:
        """With `a` the gated output of A: `dB = a dy^T`, and `B dy` is the gradient of `a`."""
        gated, weights, logits, A_and_router, matrix_B = saved
        weight, dropout_mask, num_experts = inputs.weight, inputs.dropout_mask, len(inputs.router)
        rows = as_rows(grad_output).to(inputs.settings.dtype)
        grad_gated = mm(inputs.experts_B.flatten(0, 1) if matrix_B is None else matrix_B, rows.t())
        grad_both = gates_backward(grad_gated, gated, weights, logits, grad_logits, inputs.settings)
        grad_x = grad_A = grad_B = grad_router = None
        if wanted.experts_B:
            grad_B = mm(gated, rows)
        if wanted.experts_A or wanted.router:
            grad_A, grad_router = _weight_gradients(grad_both, as_rows(inputs.x), num_experts, dropout_mask)
        if wanted.x:
            A_and_router = _join_weights(inputs, rows.dtype) if A_and_router is None else A_and_router
            if weight is not None and uses_onednn(rows, weight):
                grad_x = _input_gradient(None, grad_both, A_and_router, num_experts, dropout_mask)
                grad_x = linear_add(rows, weight.t(), None, grad_x)
            else:
                base = None if weight is None else rows @ weight
                grad_x = _input_gradient(base, grad_both, A_and_router, num_experts, dropout_mask)
        return Grads(grad_x, grad_A, grad_B, grad_router)


def _join_weights(inputs: MixtureInputs, dtype: torch.dtype) -> torch.Tensor:
    """A and, below it, the router as one matrix in the dtype of the products: `(E*r + E, in)`."""
    matrix_A = inputs.experts_A.flatten(0, 1)
    shape = len(matrix_A) + len(inputs.router), matrix_A.shape[1]
    return torch.cat((matrix_A, inputs.router), out=torch.empty(shape, dtype=dtype, device=inputs.router.device))


def _weight_gradients(grad_both, rows, num_experts: int, dropout_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of A and router; one product without dropout, because both then read the same input."""
    if dropout_mask is None:
        both = mm(grad_both, rows)
        return both[:-num_experts], both[-num_experts:]
    grad_A = mm(grad_both[:-num_experts], drop(rows, dropout_mask))
    return grad_A, mm(grad_both[-num_experts:], rows)


def _input_gradient(
    total: torch.Tensor | None, grad_both, A_and_router, num_experts: int, dropout_mask
) -> torch.Tensor:
    """The input's gradient from A and router, added to `total` in place if there is one."""
    if dropout_mask is None:
        return mm(grad_both.t(), A_and_router) if total is None else addmm_(total, grad_both.t(), A_and_router)
    from_A = drop(mm(grad_both[:-num_experts].t(), A_and_router[:-num_experts]), dropout_mask)
    total = from_A if total is None else total.add_(from_A)
    return addmm_(total, grad_both[-num_experts:].t(), A_and_router[-num_experts:])

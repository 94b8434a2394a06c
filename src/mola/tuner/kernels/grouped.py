"""Chosen experts only, in operators of torch: faster for many experts in float32 on a CPU.

Assignments of tokens to experts are sorted by expert, and a grouped product multiplies the rows of each expert with its
matrix. The arithmetic does not grow with the number of experts; sorting, gathering and adding back take extra time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mola.tuner.kernels.api import OTHER_ROUTER, Backend, Grads, Mixture, MixtureInputs, Saved
from mola.tuner.kernels.dense import why_no_own_backward
from mola.tuner.kernels.dropout import drop
from mola.tuner.kernels.gates import keep_losses_only
from mola.tuner.kernels.gemm import base_output, mm, onednn_is_faster
from mola.tuner.kernels.tensors import as_rows
from mola.tuner.routing import DEFAULT_ROUTER, router_logits_by_expert, top_k_softmax, top_k_softmax_backward

# Measured with SmolLM2's shapes, 512 tokens and top_k 2: `dense` is faster with 8 experts and slower with 16. If oneDNN
# makes the products of `dense`, in half the time, `dense` is faster with 16 experts and slower with 24.
_MIN_EXPERTS, _MIN_EXPERTS_ONEDNN = 16, 24
_ROW_BYTES = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpertSort(NamedTuple):
    """The `M = top_k * N` assignments of tokens to experts, sorted by expert.

    Attributes:
        tokens: the token of each sorted assignment, `(M,)`.
        permutation: the position of each sorted assignment in the flattened `expert_indices`, `(M,)`.
        ends: where the assignments of each expert end, int32 `(E,)`.
        expert_indices: the chosen experts, unsorted, `(top_k, N)`.
    """

    tokens: torch.Tensor
    permutation: torch.Tensor
    ends: torch.Tensor
    expert_indices: torch.Tensor

    @classmethod
    def of(cls, expert_indices: torch.Tensor, num_experts: int) -> ExpertSort:
        """Sort the chosen experts `(top_k, N)`."""
        experts = expert_indices.flatten()
        permutation = experts.argsort(stable=True)
        counts = experts.new_zeros(num_experts).scatter_add_(0, experts, torch.ones_like(experts))
        ends = counts.cumsum(0).to(torch.int32)  # `bincount` would wait for the device
        return cls(permutation % max(expert_indices.shape[1], 1), permutation, ends, expert_indices)


class Grouped(Backend):
    """Computes the chosen experts only, in grouped products."""

    name = "grouped"

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """None for sizes and dtypes that grouped products accept, without a compiler; else the reason."""
        reason = why_no_own_backward(inputs)
        if reason is not None:
            return reason
        if inputs.settings.router != DEFAULT_ROUTER:
            return OTHER_ROUTER
        if not (inputs.experts_A.is_contiguous() and inputs.experts_B.is_contiguous()):
            return "grouped products need contiguous experts"
        if inputs.settings.dtype not in _DTYPES:
            return f"grouped products are of float32, bfloat16 or float16, not {inputs.settings.dtype}"
        _, r, in_features = inputs.experts_A.shape
        row_bytes = math.gcd(r, in_features, inputs.experts_B.shape[2]) * inputs.settings.dtype.itemsize
        return f"grouped products need rows of whole {_ROW_BYTES} bytes" if row_bytes % _ROW_BYTES else None

    def why_slower(self, inputs: MixtureInputs) -> str | None:
        """None in float32 on a CPU with many experts, few of them chosen, and enough tokens; else the reason."""
        if not inputs.x.is_cpu or inputs.settings.dtype != torch.float32:
            return "slower than dense except in float32 on a CPU"
        num_experts = len(inputs.experts_A)
        min_experts = _MIN_EXPERTS_ONEDNN if onednn_is_faster() else _MIN_EXPERTS
        if 2 * num_experts < min_experts * inputs.settings.top_k or inputs.x.numel() < num_experts * inputs.x.shape[-1]:
            return "slower than dense for so few experts or tokens"
        return None

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, Saved]:
        """Gather the token of every assignment, multiply it by its expert, and add the result to its token."""
        settings = inputs.settings
        x = inputs.x.to(settings.dtype)
        logits = router_logits_by_expert(as_rows(inputs.x), inputs.router)
        expert_indices, gates = top_k_softmax(logits, settings.top_k, 0)
        sort = ExpertSort.of(expert_indices, len(inputs.router))
        weights = gates.mul_(settings.scaling).flatten().index_select(0, sort.permutation)  # (M,)
        rows = drop(as_rows(x), inputs.dropout_mask).index_select(0, sort.tokens)
        gated = F.grouped_mm(rows, inputs.experts_A.to(settings.dtype).transpose(1, 2), offs=sort.ends)  # (M, r)
        gated.mul_(weights.unsqueeze(1))
        output = base_output(inputs, x)
        _add_products(output.view(-1, output.shape[-1]), gated, inputs.experts_B.to(settings.dtype), sort)
        return Mixture(output, logits, expert_indices), Saved(x, (gated, weights, *sort))

    def backward(self, inputs: MixtureInputs, saved, grad_output, grad_logits, wanted: Grads) -> Grads:
        """Like `Dense.backward`, with one row for every assignment instead of zeros for experts not chosen."""
        gated, weights, *fields = saved
        sort, dtype = ExpertSort(*fields), inputs.settings.dtype
        x, dropout_mask = as_rows(inputs.x), inputs.dropout_mask
        rows = as_rows(grad_output).to(dtype)
        sorted_rows = rows.index_select(0, sort.tokens)  # (M, out)
        grad_hidden = F.grouped_mm(sorted_rows, inputs.experts_B.to(dtype).transpose(1, 2), offs=sort.ends)  # (M, r)
        grad_log_gates, by_choice = (
            torch.empty_like(values).index_copy_(0, sort.permutation, values).view(sort.expert_indices.shape)
            for values in ((grad_hidden * gated).sum(1), weights)
        )
        grad_chosen = top_k_softmax_backward(grad_log_gates, by_choice, inputs.settings.scaling)
        keep_losses_only(grad_chosen, None, inputs.settings)
        if grad_logits is None:
            grad_logits = grad_chosen.new_zeros(len(inputs.router), len(rows))
        grad_logits = grad_logits.scatter_add(0, sort.expert_indices, grad_chosen).to(dtype)
        grad_hidden.mul_(weights.unsqueeze(1))
        grad_x = grad_A = grad_B = grad_router = None
        if wanted.experts_B:
            grad_B = F.grouped_mm(gated.t(), sorted_rows, offs=sort.ends)
        if wanted.experts_A:
            sorted_inputs = drop(x, dropout_mask).index_select(0, sort.tokens)
            grad_A = F.grouped_mm(grad_hidden.t(), sorted_inputs, offs=sort.ends)
        if wanted.router:
            grad_router = grad_logits @ x
        if wanted.x:
            grad_x = torch.zeros_like(x) if inputs.weight is None else mm(rows, inputs.weight)
            from_A = grad_x if dropout_mask is None else torch.zeros_like(grad_x)
            _add_products(from_A, grad_hidden, inputs.experts_A.to(dtype), sort)
            if dropout_mask is not None:
                grad_x.add_(drop(from_A, dropout_mask))
            grad_x.addmm_(grad_logits.t(), inputs.router.to(dtype))
        return Grads(grad_x, grad_A, grad_B, grad_router)


def _add_products(total: torch.Tensor, rows: torch.Tensor, matrices: torch.Tensor, sort: ExpertSort) -> None:
    """Add the product of every assignment's row with its expert's matrix to the row of its token in `total`.

    Shapes: `total (N, out)`, `rows (M, r)`, in the order of `sort`, and `matrices (E, r, out)`.
    """
    products = F.grouped_mm(rows, matrices, offs=sort.ends)
    total.index_add_(0, sort.tokens, products.to(total.dtype))

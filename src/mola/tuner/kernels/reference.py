"""The formula of a mixture in plain operators of torch. All other backends are tested against it.

The backends in this file also serve calls that only plain operators can compute: calls under `torch.compile` and calls
with router jitter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mola.tuner.kernels.api import NO_ROUTER, Backend, Mixture, MixtureInputs
from mola.tuner.kernels.dropout import drop
from mola.tuner.kernels.tensors import as_rows
from mola.tuner.routing import ROUTERS, Routing, dense_gates, jitter, router_logits

_MAX_GATHERED_TOKENS = 8  # on a CPU, compiled `gathered` is faster up to this many tokens


class Reference(Backend):
    """Computes all experts for all tokens; the gates of experts that were not chosen are 0."""

    name = "reference"
    uses_autograd = True

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """Why this backend cannot compute the inputs; None for all inputs with a router."""
        return NO_ROUTER if inputs.router is None else None

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, None]:
        """`y = base output + scaling * sum_e g_e B_e A_e dropout(x)`, with the gates `g` of the router."""
        # The order of these calls fixes the order in which autograd adds the gradients of `x`, and so their rounding.
        result = _base_output(inputs)
        logits, routing = _route(inputs)
        experts_A, experts_B = inputs.experts_A, inputs.experts_B
        gates = dense_gates(routing, len(experts_A)) * inputs.settings.scaling
        hidden = F.linear(as_rows(_after_dropout(inputs)), experts_A.flatten(0, 1))  # (N, E*r)
        hidden = hidden.unflatten(1, experts_A.shape[:2]) * gates.to(hidden.dtype).unsqueeze(-1)  # (N, E, r)
        return _add_update(result, hidden.flatten(1) @ experts_B.flatten(0, 1), logits, routing)


class Gathered(Reference):
    """Computes the chosen experts only. Under `torch.compile` this needs no copies of the matrices."""

    name = "gathered"

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """Why this backend cannot compute the inputs; None if they have a router and no gradients are recorded."""
        if inputs.router is None:
            return NO_ROUTER
        return "gradients are recorded" if torch.is_grad_enabled() else None

    def why_slower(self, inputs: MixtureInputs) -> str | None:
        """Why a later backend is faster; None for compiled calls with few tokens.

        In calls that are not compiled, indexing copies the matrices of the chosen experts for every token.
        """
        if not torch.compiler.is_compiling():
            return "only faster under a compiler"
        num_tokens = inputs.x.numel() // inputs.x.shape[-1]
        reads_fewer_matrices = inputs.settings.top_k * num_tokens < len(inputs.experts_A)
        return (
            None
            if reads_fewer_matrices or (inputs.x.is_cpu and num_tokens <= _MAX_GATHERED_TOKENS)
            else "too many tokens"
        )

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, None]:
        """Like `Reference.forward`, but sums over the chosen experts only, in float32 (float64 for float64 input)."""
        result = _base_output(inputs)
        logits, routing = _route(inputs)
        rows = as_rows(_after_dropout(inputs))
        dtype = torch.promote_types(rows.dtype, torch.float32)
        chosen_A = inputs.experts_A[routing.expert_indices]  # (N, top_k, r, in)
        chosen_B = inputs.experts_B[routing.expert_indices]  # (N, top_k, r, out)
        hidden = (chosen_A.to(dtype) * rows.to(dtype)[:, None, None, :]).sum(-1)  # (N, top_k, r)
        hidden = hidden * (routing.routing_weights * inputs.settings.scaling).unsqueeze(-1)
        return _add_update(result, (hidden.unsqueeze(-1) * chosen_B.to(dtype)).sum((1, 2)), logits, routing)


class Lora(Reference):
    """One expert without a router: the same operators as PEFT's LoRA, with bitwise equal results."""

    name = "lora"

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """Why this backend cannot compute the inputs; None for a layer with one expert."""
        return None if inputs.router is None else "there are several experts"

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, None]:
        """`y = base output + scaling * B A dropout(x)`."""
        result = _base_output(inputs)
        # The copy has the memory layout of PEFT's LoRA, so results are equal to the last bit.
        weight_B = inputs.experts_B[0].t().contiguous()
        hidden = F.linear(_after_dropout(inputs), inputs.experts_A[0])
        return Mixture(result + F.linear(hidden, weight_B) * inputs.settings.scaling), None


def _route(inputs: MixtureInputs) -> tuple[torch.Tensor, Routing]:
    settings = inputs.settings
    logits = router_logits(jitter(inputs.x, settings.jitter) if settings.jitter else inputs.x, inputs.router)
    return logits, ROUTERS[settings.router](logits, settings.top_k, -1)


def _after_dropout(inputs: MixtureInputs) -> torch.Tensor:
    """The experts' input after dropout: with `inputs.dropout_mask` if there is one, otherwise with torch's dropout.

    With a mask, `settings.scaling` already includes the factor 1 / (1 - p).
    """
    if inputs.dropout_mask is not None:
        # Autograd cannot differentiate `drop`, which may be a native function. Applied to ones, `drop` gives the mask.
        return torch.where(drop(torch.ones_like(inputs.x), inputs.dropout_mask).bool(), inputs.x, 0.0)
    return F.dropout(inputs.x, inputs.settings.dropout) if inputs.settings.dropout else inputs.x


def _base_output(inputs: MixtureInputs) -> Any:
    return inputs.base_output if inputs.weight is None else F.linear(inputs.x, inputs.weight, inputs.bias)


def _add_update(
    result: torch.Tensor, update: torch.Tensor, logits: torch.Tensor, routing: Routing
) -> tuple[Mixture, None]:
    return Mixture(result + update.view(result.shape), logits.t(), routing.expert_indices.t()), None

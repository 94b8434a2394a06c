"""From router logits to gates: `top_k_softmax` is the paper's formula.

- `router_logits`: the logits `z = x Wr^T`.
- `top_k_softmax`: chooses experts and computes their gates. `ROUTERS` is the table of such functions.
- `top_k_softmax_backward`: its gradient as a formula, for backends that do not use autograd.
- `router_backward`: the gradient of any router in the table, with autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

_FEW_TOKENS = 32  # up to this many tokens one sort is faster than `top_k` passes over the experts


class Routing(NamedTuple):
    """Chosen experts of `N` tokens and their gates. Shapes are for logits `(N, E)`, transposed for `(E, N)`.

    Attributes:
        expert_indices: chosen experts, integers `(N, top_k)`: largest logit first, or in the order of the experts if
            all are chosen.
        routing_weights: gates of the chosen experts, float32 `(N, top_k)`; each row sums to 1.
    """

    expert_indices: torch.Tensor
    routing_weights: torch.Tensor


def router_logits(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Router logits `z = x Wr^T` in float32 (float64 for float64 input), even under autocast.

    In bfloat16, rounding would reorder nearly equal logits, and some tokens would be routed to different experts.

    Args:
        hidden_states: `(..., in)`.
        weight: `(E, in)`.

    Returns:
        `(N, E)`, where `N` is the product of the leading dimensions.
    """
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    device = tokens.device.type
    # `torch.autocast` does not accept the device "meta".
    if device != "meta" and (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        with torch.autocast(device_type=device, enabled=False):
            return F.linear(tokens.to(dtype), weight.to(dtype))
    return F.linear(tokens.to(dtype), weight.to(dtype))


def router_logits_by_expert(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`router_logits`, transposed to `(E, N)`, without autograd.

    Args:
        tokens: `(N, in)`.
        weight: `(E, in)`.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    logits = torch.empty(weight.shape[0], tokens.shape[0], dtype=dtype, device=tokens.device)
    # Autocast leaves operators with `out` in their dtype.
    return torch.mm(weight.to(dtype), tokens.to(dtype).t(), out=logits)


def top_k_softmax(logits: torch.Tensor, top_k: int, dim: int = -1) -> Routing:
    r"""The paper's router: softmax over all experts, keep the `top_k` largest, renormalise.

        p = softmax(z),   S = the top_k largest,   g_e = p_e / sum_{S} p    (paper, section 3.1)

    Renormalised probabilities equal the softmax over the chosen logits, which this function computes.
    Ties are broken by the lowest index, on every device and for every batch size.

    Args:
        logits: float32 `(N, E)`, or `(E, N)` with `dim=0`.
        top_k: experts per token, `1 <= top_k <= E`.
        dim: dimension of the experts.
    """
    if top_k == logits.shape[dim]:
        shape = (-1, 1) if dim == 0 else (1, -1)
        all_experts = torch.arange(top_k, device=logits.device).view(shape).expand(logits.shape)
        return Routing(all_experts, torch.softmax(logits, dim))
    largest, expert_indices = _largest(logits, top_k, dim)
    return Routing(expert_indices, torch.softmax(largest, dim))


DEFAULT_ROUTER = "top_k_softmax"
Router = Callable[[torch.Tensor, int, int], Routing]
ROUTERS: dict[str, Router] = {DEFAULT_ROUTER: top_k_softmax}


def dense_gates(routing: Routing, num_experts: int, dim: int = -1) -> torch.Tensor:
    """Gates of all experts along `dim`, zero for experts that were not chosen: float32 `(N, E)`, or `(E, N)`."""
    indices, gates = routing
    shape = [num_experts if axis == dim % 2 else gates.shape[axis] for axis in range(2)]
    return gates.new_zeros(shape).scatter_(dim, indices, gates)


def route_dense(router: str, logits: torch.Tensor, top_k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense gates (see `dense_gates`) and chosen experts; `router` is a name in `ROUTERS`."""
    expert_indices, gates = routing = ROUTERS[router](logits, top_k, dim)
    num_experts = logits.shape[dim]
    # If all experts are chosen, the default router returns them in their order, so that no scatter is needed.
    in_order = router == DEFAULT_ROUTER and top_k == num_experts
    return gates if in_order else dense_gates(routing, num_experts, dim), expert_indices


def top_k_softmax_backward(
    grad_log_gates: torch.Tensor,
    scaled_gates: torch.Tensor,
    scaling: float,
    grad_logits: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the loss with respect to the logits, through `top_k_softmax`. Dimension 0 is the experts.

    Let `a_e` be the output of expert `e`, gate and scaling included, and `t` the gradient of the loss with respect to
    the sum of these outputs. Then `v_e = <t, a_e>` is the gradient with respect to `log g_e`, and

        dz_e = v_e - g_e * sum_k v_k

    Args:
        grad_log_gates: `v`, `(E, N)` with zeros for experts that were not chosen, or `(top_k, N)`; may be overwritten.
        scaled_gates: `scaling * g`, in the same shape.
        scaling: the adapter's scaling.
        grad_logits: gradient of the router losses with respect to the logits, in the same shape.
        out: tensor that receives the result.
    """
    total = grad_log_gates.sum(0, keepdim=True)
    if grad_logits is not None:
        grad_log_gates += grad_logits
    return torch.addcmul(grad_log_gates, scaled_gates, total, value=-1.0 / scaling, out=out)


def router_backward(router: str, logits: torch.Tensor, top_k: int, grad_log_gates: torch.Tensor) -> torch.Tensor:
    """Like `top_k_softmax_backward`, for any router: backpropagates the gate gradients `v_e / g_e` with autograd.

    Args:
        router: name in `ROUTERS`.
        logits: `(E, N)`.
        top_k: experts per token.
        grad_log_gates: `v`, gradient with respect to `log g`, `(E, N)`.
    """
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        routing = ROUTERS[router](logits, top_k, 0)
    gates, chosen = routing.routing_weights, grad_log_gates.gather(0, routing.expert_indices)
    grad_gates = torch.where(gates > 0, chosen / gates, 0.0).detach()  # an expert with gate 0 contributes nothing
    return torch.autograd.grad(gates, logits, grad_gates)[0]


def _largest(logits: torch.Tensor, count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits along `dim` and their indices, largest first, ties broken by the lowest index.

    `torch.topk` does not define the order of equal values. `sort(stable=True)` and `max` do.
    """
    num_tokens = logits.shape[1 - dim % 2]
    if not torch.compiler.is_compiling() and num_tokens <= _FEW_TOKENS:
        values, order = torch.sort(logits, dim=dim, descending=True, stable=True)
        return values.narrow(dim, 0, count), order.narrow(dim, 0, count)
    indices: list[torch.Tensor] = []
    remaining = logits.detach().clamp(min=torch.finfo(logits.dtype).min)  # no -inf yet: it marks chosen experts below
    for _ in range(count):
        if indices:
            remaining = remaining.scatter(dim, indices[-1], float("-inf"))
        indices.append(remaining.max(dim, keepdim=True).indices)
    expert_indices = torch.cat(indices, dim)
    return logits.gather(dim, expert_indices), expert_indices


def jitter(hidden_states: torch.Tensor, noise: float) -> torch.Tensor:
    """Multiply by uniform noise from `[1 - noise, 1 + noise]` (Switch Transformers, section 2.2)."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)  # bfloat16 has few numbers near 1
    return hidden_states * torch.empty_like(hidden_states, dtype=dtype).uniform_(1.0 - noise, 1.0 + noise)

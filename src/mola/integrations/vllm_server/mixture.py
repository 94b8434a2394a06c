"""Computes what a mixture adds to one linear of a server. Needs torch and mola's gates, not vLLM.

- The input is read once: the A matrices and routers of all parts are rows of one matrix.
- Parts with the same settings are routed together, by operators over all of them.
- With several ranks a part holds a slice of B's outputs, or a slice of the inputs of A and router. In the second case
  router logits are summed over ranks. Everything after the gates is linear, so it is summed with the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mola.integrations.vllm_server.parts import Part, PartSettings
from mola.tuner.routing import route_dense

Product = Callable[[torch.Tensor], torch.Tensor]  # of a matrix with rows, one row per token; or a sum over ranks


class _Group(NamedTuple):
    """Neighbouring parts that are routed together."""

    settings: PartSettings
    parts: int
    hidden: slice  # columns of the products with A
    logits: slice  # columns of the router logits; empty for one expert


class FusedMixture(nn.Module):
    r"""The updates of all parts, added to a linear's output.

        y[:, columns of p] += scaling_p * sum_e g_pe(x) B_pe A_pe x

    Args:
        parts: in any order; their columns do not overlap.
        dtype: dtype of the products with A and B. Products with routers are in float32.
        device: device of the linear.
        reduce: sums router logits over ranks, if each rank has a slice of the input; None if each rank has all of it.
        linear: makes the server's fastest function `x -> x W^T` for a matrix `(out, in)`. None keeps the matrices as
            buffers, outside of checkpoints, and leaves the products to torch.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        dtype: torch.dtype,
        device: Any = "cpu",
        reduce: Product | None = None,
        linear: Callable[[torch.Tensor], Product] | None = None,
    ) -> None:
        super().__init__()
        self.dtype, self.reduce, self.linear = dtype, reduce, linear
        parts = sorted(parts, key=lambda part: (part.settings, part.start))
        self.groups: list[_Group] = []
        self.num_hidden = self.num_logits = 0
        for settings, members in groupby(parts, key=lambda part: part.settings):
            count = len(list(members))
            hidden_end = self.num_hidden + count * settings.num_experts * settings.r
            logits_end = self.num_logits + (count * settings.num_experts if settings.num_experts > 1 else 0)
            columns = slice(self.num_hidden, hidden_end), slice(self.num_logits, logits_end)
            self.groups.append(_Group(settings, count, *columns))
            self.num_hidden, self.num_logits = hidden_end, logits_end
        self.products: dict[str, Product] = {}
        matrices = [part.experts_A.flatten(0, 1) for part in parts]
        routers = [part.router for part in parts if part.router is not None]
        # Routers are rows of the same matrix as A if they have its dtype. Otherwise they keep a float32 matrix.
        self.has_router_matrix = bool(routers) and dtype is not torch.float32
        if self.has_router_matrix:
            self._keep("router", torch.cat(routers).to(device, torch.float32))
        else:
            matrices += routers
        self._keep("matrix_A", torch.cat(matrices).to(device, dtype))
        self.columns = [slice(part.start, part.start + part.experts_B.shape[2]) for part in parts]
        for number, part in enumerate(parts):
            self._keep(f"matrix_B{number}", part.experts_B.flatten(0, 1).t().to(device, dtype))

    def _keep(self, name: str, matrix: torch.Tensor) -> None:
        matrix = matrix.contiguous()
        if self.linear is None:
            self.register_buffer(name, matrix, persistent=False)
        else:
            self.products[name] = self.linear(matrix)

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add the updates for `x: (..., in)` to `output: (..., out)`, in place, and return it."""
        rows, total = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        hidden = self._product("matrix_A", rows.to(self.dtype))  # (N, all E*r), and the logits without a router matrix
        logits = self._product("router", rows.float()) if self.has_router_matrix else hidden[:, self.num_hidden :]
        if self.reduce is not None and self.num_logits:
            logits = self.reduce(logits.contiguous())
        number = 0
        for group in self.groups:
            gated = _gate(hidden[:, group.hidden], logits[:, group.logits], group)
            for part in gated.tensor_split(group.parts, dim=1):
                self._add(total[:, self.columns[number]], part, f"matrix_B{number}")
                number += 1
        return output

    def _product(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        product = self.products.get(name)
        return F.linear(rows, getattr(self, name)) if product is None else product(rows)

    def _add(self, total: torch.Tensor, rows: torch.Tensor, name: str) -> None:
        if self.linear is None and total.dtype is self.dtype:  # one operator
            total.addmm_(rows, getattr(self, name).t())
        else:
            total.add_(self._product(name, rows.contiguous()))


def _gate(hidden: torch.Tensor, logits: torch.Tensor, group: _Group) -> torch.Tensor:
    """The products with A, times gates and scaling."""
    (num_experts, r, top_k, scaling, router), count = group.settings, group.parts * group.settings.num_experts
    if num_experts == 1:
        return hidden * scaling
    gates, _ = route_dense(router, logits.reshape(-1, num_experts), top_k, -1)
    weights = gates.mul_(scaling).view(-1, count, 1)
    return (hidden.unflatten(1, (count, r)) * weights.to(hidden.dtype)).flatten(1)

"""What a token sees of an adapter: measures of every adapted linear, from the forward passes that happen anyway.

The update that token `n` sees in a linear with the gates `g` is a matrix that is never formed:

    D_n = sum_e g_ne s B_e A_e

Its effective rank is the participation ratio of its squared singular values `s_i^2`. It lies between 1 and the rank,
and is 0 for a zero update:

    effective rank = (sum_i s_i^2)^2 / sum_i s_i^4 = tr(D D^T)^2 / tr((D D^T)^2)

Both traces are polynomials in the gates. Their coefficients follow from `A_e A_f^T` and `B_e^T B_f`, of size `(r, r)`,
so they are computed once for a linear; a token then costs `E^4` products. A LoRA is one expert with gate 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from mola.errors import MolaError
from mola.insight.recorder import FIRST_GATE, ModuleGates, effective_experts, recorded_gates
from mola.insight.redundancy import in_float64
from mola.tuner.layer import MolaLinear

QUANTILES = (0.1, 0.5, 0.9)


class Forms(NamedTuple):
    """Coefficients of the traces of `D D^T` and `(D D^T)^2` without scaling, which the effective rank does not contain.

    Attributes:
        second: `(E, E)`, `tr(D_e D_f^T)`.
        fourth: `(E, E, E, E)`, `tr(D_e D_f^T D_h D_k^T)`.
    """

    second: torch.Tensor
    fourth: torch.Tensor


def forms(experts_A: torch.Tensor, experts_B: torch.Tensor) -> Forms:
    """Coefficients of a linear's experts.

    Args:
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.

    Returns:
        float64, from `tr(D_e D_f^T D_h D_k^T) = tr(A_e A_f^T  B_f^T B_h  A_h A_k^T  B_k^T B_e)`.
    """
    products_A, products_B = gram(experts_A), gram(experts_B)
    second = torch.einsum("eafb,eafb->ef", products_A, products_B)
    halves = torch.einsum("eafb,fbhc->efhac", products_A, products_B)
    return Forms(second, torch.einsum("efhac,hkeca->efhk", halves, halves))


def gram(stack: torch.Tensor) -> torch.Tensor:
    """Inner products of all rows of `(E, r, features)`: float64 `(E, r, E, r)`."""
    rows = in_float64(stack.detach().flatten(0, 1))
    return (rows @ rows.t()).view(*stack.shape[:2], *stack.shape[:2])


def effective_ranks(gates: torch.Tensor, of: Forms) -> torch.Tensor:
    """Effective rank of the update for each row of gates `(N, E)`; float64 `(N,)`, 0 for a zero update."""
    pairs = torch.einsum("ne,nf->nef", gates, gates).flatten(1)  # (N, E^2)
    second = pairs @ of.second.flatten()
    fourth = ((pairs @ of.fourth.flatten(2).flatten(0, 1)) * pairs).sum(1)
    return torch.where(fourth > 0, second.square() / fourth, 0.0)


class LinearMeasures:
    """Measures of one linear, gathered over the tokens of any number of forward passes."""

    def __init__(self, name: str, layer: MolaLinear) -> None:
        names = [each for each in layer.active_adapters if each in layer.settings]
        if len(names) != 1:
            raise MolaError(f"one adapter must be active to see what a token sees: in {name} it is {names}.")
        self.name, self.layer, self.adapter = name, layer, names[0]
        self.experts_A, self.experts_B = layer.mola_A[self.adapter], layer.mola_B[self.adapter]
        self._forms = forms(self.experts_A, self.experts_B)
        self._products_B = gram(self.experts_B).flatten(2).flatten(0, 1)  # (E r, E r)
        self._gates: torch.Tensor | float = 0.0  # sum over tokens, (E,)
        self._values: dict[str, list[torch.Tensor]] = {}

    @property
    def has_tokens(self) -> bool:
        """Whether a token was measured; an expert of a MoE base may have none."""
        return bool(self._values)

    @torch.no_grad()
    def add(self, x: torch.Tensor, frozen_output: torch.Tensor, gates: torch.Tensor | None) -> None:
        """Measure the tokens of one call.

        Args:
            x: input of the linear, `(..., in)`.
            frozen_output: output of the frozen linear, `(..., out)`.
            gates: `(N, E)`; None for a linear with one expert, which has no router.
        """
        x, frozen_output = x.flatten(0, -2), frozen_output.flatten(0, -2)
        A = self.experts_A.detach().float()
        read = in_float64(torch.einsum("ni,eri->ner", x.float(), A))
        gates = read.new_ones(len(x), 1) if gates is None else gates.to(read)
        written = (gates.unsqueeze(-1) * read).flatten(1)  # B^T times this is the update's output
        squared = ((written @ self._products_B) * written).sum(1).clamp(min=0)
        update = self.layer.scaling[self.adapter] * squared.sqrt()
        frozen = in_float64(torch.linalg.vector_norm(frozen_output.float(), dim=-1))
        self._gates = self._gates + gates.sum(0)
        measured = {
            "effective_experts": effective_experts(gates, 1),
            "first_gate": gates.amax(1),
            "effective_rank": effective_ranks(gates, self._forms),
            "update_norm": update,
            "relative_norm": update / frozen,
        }
        for key, values in measured.items():
            self._values.setdefault(key, []).append(values.float().cpu())

    def row(self) -> dict[str, Any]:
        """The measures: means and quantiles over all tokens, and the effective rank of their mean update.

        `update_norm` is `||D_n x_n||`, `relative_norm` is `||D_n x_n|| / ||W x_n + b||`. The mean update has the mean
        gates of all tokens, and `mean_gates` are these.
        """
        values = {key: torch.cat(parts) for key, parts in self._values.items()}
        first = values.pop("first_gate")
        mean = self._gates / len(first)
        settings = self.layer.settings[self.adapter]
        return {
            "module": self.name,
            "layer_index": self.layer.layer_index,
            "linear": self.name.rpartition(".")[2],
            "num_experts": settings.num_experts,
            "top_k": settings.top_k,
            "r": settings.r,
            "tokens": len(first),
            "mean_gates": mean.tolist(),
            "first_gate_above": (first > FIRST_GATE).double().mean().item(),
            "mean_update_rank": effective_ranks(mean.unsqueeze(0), self._forms).item(),
        } | {key: summary(each) for key, each in values.items()}


def summary(values: torch.Tensor) -> dict[str, float]:
    """Mean and the 10 %, 50 % and 90 % quantiles of values of tokens."""
    values = values.double()
    found = {f"p{round(100 * level)}": values.quantile(level).item() for level in QUANTILES}
    return {"mean": values.mean().item()} | found


@contextmanager
def measured_updates(model: nn.Module) -> Iterator[list[LinearMeasures]]:
    """Measure every adapted linear in every forward pass of a `with` block.

    Args:
        model: a model in eval mode with one active adapter of mola.

    Yields:
        The measures of each linear.

    Raises:
        MolaError: no linear is adapted, or a linear has several active adapters.
    """
    linears = [LinearMeasures(name, each) for name, each in model.named_modules() if isinstance(each, MolaLinear)]
    if not linears:
        raise MolaError("the adapter must be a mixture or a LoRA of mola: no linear of the model has experts.")
    with ExitStack() as hooks:
        recorded = hooks.enter_context(recorded_gates(model))
        for each in linears:
            # The hook of the frozen linear inside runs after the gates of its layer are recorded.
            hooks.enter_context(each.layer.base_layer.register_forward_hook(_hook(each, recorded)))
        yield linears


def _hook(linear: LinearMeasures, recorded: list[ModuleGates]) -> Callable[..., None]:
    has_router = linear.adapter in linear.layer.mola_router

    def measure(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found = recorded.pop() if has_router else None
        assert found is None or found.module == linear.name
        linear.add(inputs[0], output, None if found is None else found.gates)

    return measure

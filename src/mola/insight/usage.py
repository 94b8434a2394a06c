"""How the experts of a module are used, over any number of forward passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mola.errors import MolaError
from mola.insight.recorder import FIRST_GATE, SCALAR_SUMS, ModuleGates, RecordedRouter, effective_experts


@dataclass(frozen=True)
class ModuleUsage:
    r"""Use of one module's experts over the counted tokens.

    Attributes:
        module: its name in the model.
        layer_index: its decoder layer, None outside the layers.
        num_tokens: number of counted tokens.
        shares: for each expert, the share of tokens that chose it; shares add up to `top_k`.
        mean_gates: for each expert, its mean gate `m_e`; mean gates add up to 1.
        balance: entropy of the mean gates divided by its maximum, `-sum_e m_e log m_e / log E`: 1 if all experts have
            the same weight, 0 if one expert has all of it.
        entropy: mean over tokens of the entropy of the router's softmax `p` over all experts, `-sum_e p_e log p_e /
            log E`: 1 if a router is undecided, 0 if it is sure.
        margin: mean difference between the largest and the second largest gate; 1 if only one expert is chosen.
        effective_experts: mean over tokens of `1 / sum_e g_e^2`: 1 if one expert has the whole gate, `top_k` if all
            chosen experts have the same gate.
        first_gate_above: share of tokens whose largest gate is above 0.9.
        dead_experts: experts that no token chose.
    """

    module: str
    layer_index: int | None
    num_tokens: int
    shares: tuple[float, ...]
    mean_gates: tuple[float, ...]
    balance: float
    entropy: float
    margin: float
    effective_experts: float
    first_gate_above: float
    dead_experts: tuple[int, ...]


class UsageCounter:
    """Sums of gates over tokens, by module, in float64."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int | None], torch.Tensor] = {}

    def add(self, recorded: list[ModuleGates], token_mask: torch.Tensor | None = None) -> None:
        """Count the tokens of one forward pass.

        Args:
            recorded: gates from `recorded_gates`.
            token_mask: N elements in any shape, nonzero for tokens that count; None counts all.
        """
        for each in recorded:
            gates, entropies = each.gates.double(), each.entropies.double()
            if token_mask is not None:
                counted = token_mask.flatten().to(gates.device) != 0
                gates, entropies = gates[counted], entropies[counted]
            largest = gates.topk(2, dim=1).values
            by_token = [
                entropies,
                largest[:, 0] - largest[:, 1],
                effective_experts(gates, 1),
                (largest[:, 0] > FIRST_GATE).double(),
                torch.ones_like(entropies),
            ]
            sums = torch.cat([(gates > 0).sum(0).double(), gates.sum(0), torch.stack(by_token).sum(1)])
            key = each.module, each.layer_index
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def usage(self) -> list[ModuleUsage]:
        """The use of every counted module, in order of first appearance.

        Raises:
            MolaError: no token was counted.
        """
        if not any(sums[-1] for sums in self._sums.values()):
            raise MolaError("there is no use of experts to report: no token was counted, or no module has a router.")
        return [_module_usage(*key, sums) for key, sums in self._sums.items() if sums[-1]]


def usage_of_sums(routers: Sequence[RecordedRouter], sums: torch.Tensor) -> list[ModuleUsage]:
    """Use of experts from the sums of a `RouterRecorder`; routers without counted tokens are left out.

    Args:
        routers: the recorder's `routers`.
        sums: a row for each router, from `RouterRecorder.sums`.
    """
    return [
        _module_usage(router.module, router.layer_index, row, router.num_experts)
        for router, row in zip(routers, sums, strict=True)
        if row[-1] > 0
    ]


def _module_usage(
    module: str, layer_index: int | None, sums: torch.Tensor, num_experts: int | None = None
) -> ModuleUsage:
    """Use of one module from its sums, which may be padded for more than `num_experts` experts."""
    width = (len(sums) - SCALAR_SUMS) // 2
    chosen, gates, (entropy, margin, effective, above, tokens) = sums.split([width, width, SCALAR_SUMS])
    chosen, mean = chosen[:num_experts], gates[:num_experts] / tokens
    return ModuleUsage(
        module,
        layer_index,
        round(tokens.item()),
        tuple((chosen / tokens).tolist()),
        tuple(mean.tolist()),
        torch.special.entr(mean).sum().item() / math.log(len(mean)),
        (entropy / tokens).item(),
        (margin / tokens).item(),
        (effective / tokens).item(),
        (above / tokens).item(),
        tuple(torch.nonzero(chosen == 0).flatten().tolist()),
    )

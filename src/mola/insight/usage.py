"""How the experts of a module are used, over any number of forward passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mola.errors import MolaError
from mola.insight.recording import ModuleGates


@dataclass(frozen=True)
class ModuleUsage:
    r"""Use of one module's experts over the counted tokens.

    Attributes:
        module: its name in the model.
        layer_index: its decoder layer, None outside the layers.
        num_tokens: counted tokens.
        shares: of each expert, the share of tokens that chose it; they add up to `top_k`.
        mean_gates: of each expert, its mean gate `m_e`; they add up to 1.
        balance: entropy of the mean gates over its largest value, `-sum_e m_e log m_e / log E`: 1 where all experts
            have the same weight, 0 where one has all of it.
        entropy: mean over tokens of the entropy of the router's softmax `p` over all experts, `-sum_e p_e log p_e /
            log E`: 1 where a router is undecided, 0 where it is sure.
        margin: mean difference of the largest and the second largest gate; 1 where one expert is chosen.
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
    dead_experts: tuple[int, ...]


class UsageCounter:
    """Sums over tokens, by module; sums are float64, so the order of batches changes nothing that matters."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def add(self, recorded: list[ModuleGates], token_mask: torch.Tensor | None = None) -> None:
        """Count the tokens of one forward pass.

        Args:
            recorded: gates, as `recorded_gates` lists them.
            token_mask: `(N,)`, nonzero for tokens that count, or of any shape with N elements; None counts all.

        Raises:
            MolaError: a module saw another number of tokens than the mask has.
        """
        for each in recorded:
            gates, entropies = each.gates, each.entropies
            if token_mask is not None:
                if token_mask.numel() != len(gates):
                    raise MolaError(
                        f"`token_mask` must have one element per token: {each.module} saw {len(gates)} tokens, the "
                        f"mask has {token_mask.numel()}."
                    )
                counted = token_mask.flatten().to(gates.device) != 0
                gates, entropies = gates[counted], entropies[counted]
            sums = self._sums.get(each.module)
            if sums is None:
                sums = self._sums[each.module] = _Sums(each.layer_index, gates.shape[1])
            sums.add(gates, entropies)

    def usage(self) -> list[ModuleUsage]:
        """The use of every module that was counted, in the order of their first appearance.

        Raises:
            MolaError: no token was counted.
        """
        if not any(sums.num_tokens for sums in self._sums.values()):
            raise MolaError("there is no use of experts to report: no token was counted, or no module has a router.")
        return [sums.usage(module) for module, sums in self._sums.items() if sums.num_tokens]


class _Sums:
    def __init__(self, layer_index: int | None, num_experts: int) -> None:
        self.layer_index = layer_index
        self.num_tokens = 0
        self.chosen = torch.zeros(num_experts, dtype=torch.float64)
        self.gates = torch.zeros(num_experts, dtype=torch.float64)
        self.entropy = 0.0
        self.margin = 0.0

    def add(self, gates: torch.Tensor, entropies: torch.Tensor) -> None:
        self.num_tokens += len(gates)
        self.chosen += (gates > 0).sum(0).double()
        self.gates += gates.double().sum(0)
        self.entropy += entropies.double().sum().item()
        largest = gates.double().topk(2, dim=1).values
        self.margin += (largest[:, 0] - largest[:, 1]).sum().item()

    def usage(self, module: str) -> ModuleUsage:
        return usage_of_sums(
            module, self.layer_index, self.num_tokens, self.chosen, self.gates, self.entropy, self.margin
        )


def usage_of_sums(
    module: str,
    layer_index: int | None,
    num_tokens: int,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    entropy: float,
    margin: float,
) -> ModuleUsage:
    """Use of one module from sums over tokens.

    Args:
        module: its name.
        layer_index: its decoder layer.
        num_tokens: how many tokens, at least 1.
        chosen: how many of them chose each expert, float64 `(E,)`.
        gates: sum of each expert's gates, float64 `(E,)`.
        entropy: sum of the entropies of the router's softmax, each over `log E`.
        margin: sum of the differences of the largest and the second largest gate.
    """
    mean = gates / num_tokens
    return ModuleUsage(
        module,
        layer_index,
        num_tokens,
        tuple((chosen / num_tokens).tolist()),
        tuple(mean.tolist()),
        torch.special.entr(mean).sum().item() / math.log(len(mean)),
        entropy / num_tokens,
        margin / num_tokens,
        tuple(torch.nonzero(chosen == 0).flatten().tolist()),
    )

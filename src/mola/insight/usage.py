"""How the experts of a module are used, over any number of forward passes."""

import math
from dataclasses import dataclass

import torch

from mola.errors import MolaError
from mola.insight.float64 import in_float64
from mola.insight.recording import ModuleGates

FURTHER = 3  # sums of a module besides two for each expert: entropies, margins, tokens


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
        self._sums: dict[tuple[str, int | None], torch.Tensor] = {}

    def add(self, recorded: list[ModuleGates], token_mask: torch.Tensor | None = None) -> None:
        """Count the tokens of one forward pass.

        Args:
            recorded: gates, as `recorded_gates` lists them.
            token_mask: `(N,)`, nonzero for tokens that count, or of any shape with N elements; None counts all.

        Raises:
            MolaError: a module saw another number of tokens than the mask has.
        """
        for each in recorded:
            gates, entropies = in_float64(each.gates), in_float64(each.entropies)
            if token_mask is not None:
                if token_mask.numel() != len(gates):
                    raise MolaError(
                        f"`token_mask` must have one element per token: {each.module} saw {len(gates)} tokens, the "
                        f"mask has {token_mask.numel()}."
                    )
                counted = token_mask.flatten().to(gates.device) != 0
                gates, entropies = gates[counted], entropies[counted]
            largest = gates.topk(2, dim=1).values
            further = [entropies.sum(), (largest[:, 0] - largest[:, 1]).sum(), largest.new_tensor(len(gates))]
            sums = torch.cat([(gates > 0).sum(0).double(), gates.sum(0), torch.stack(further)])
            place = each.module, each.layer_index
            self._sums[place] = self._sums[place] + sums if place in self._sums else sums

    def usage(self) -> list[ModuleUsage]:
        """The use of every module that was counted, in the order of their first appearance.

        Raises:
            MolaError: no token was counted.
        """
        if not any(sums[-1] for sums in self._sums.values()):
            raise MolaError("there is no use of experts to report: no token was counted, or no module has a router.")
        return [usage_of_sums(*place, sums) for place, sums in self._sums.items() if sums[-1]]


def usage_of_sums(
    module: str, layer_index: int | None, sums: torch.Tensor, num_experts: int | None = None
) -> ModuleUsage:
    """Use of one module from sums over tokens.

    Args:
        module: its name.
        layer_index: its decoder layer.
        sums: float64 `(2 E + FURTHER,)`: how many tokens chose each expert; each expert's gates; entropies of the
            router's softmax, each over `log E`; differences of the two largest gates; tokens, at least one.
        num_experts: those that count, where the sums have room for more.
    """
    width = (len(sums) - FURTHER) // 2
    chosen, gates, (entropy, margin, tokens) = sums.split([width, width, FURTHER])
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
        tuple(torch.nonzero(chosen == 0).flatten().tolist()),
    )

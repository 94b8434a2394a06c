"""A trained adapter on data: which experts work on which tokens, and how different they are."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.files.terminal import progress
from mola.insight.ablation import LeftOut
from mola.insight.agreement import AgreementCounter
from mola.insight.recording import ModuleGates, gates_of_tokens
from mola.insight.redundancy import expert_distances, mean_pairwise, subspace_overlaps
from mola.insight.usage import ModuleUsage, UsageCounter
from mola.tuner.layer import MolaLinear


@dataclass(frozen=True)
class ModuleRedundancy:
    """How alike the experts of one module are; means over pairs of experts."""

    module: str  # its name in the model
    layer_index: int | None  # its decoder layer, None outside the layers
    distance: float  # Frobenius distance of the updates, see `mola.insight.redundancy.expert_distances`
    input_overlap: float  # overlap of what experts read, from 0 to 1; NaN where a matrix is zero
    output_overlap: float  # overlap of what experts write


def redundancy_of(model: torch.nn.Module) -> list[ModuleRedundancy]:
    """Redundancy of every module of the active adapters that has several experts."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MolaLinear):
            for adapter in module.active_adapters:
                if module.num_experts.get(adapter, 1) > 1:
                    factors = module.mola_A[adapter], module.mola_B[adapter]
                    found.append(module_redundancy(name, module.layer_index, *factors, module.scaling[adapter]))
    return found


def module_redundancy(
    module: str, layer_index: int | None, experts_A: torch.Tensor, experts_B: torch.Tensor, scaling: float
) -> ModuleRedundancy:
    """Redundancy of one module with several experts, A `(E, r, in)` and B `(E, r, out)`."""
    distances = expert_distances(experts_A, experts_B, scaling)
    overlaps = (mean_pairwise(subspace_overlaps(stack)) for stack in (experts_A, experts_B))
    return ModuleRedundancy(module, layer_index, mean_pairwise(distances), *overlaps)


@dataclass(frozen=True)
class Seen:
    """What was seen of the routers."""

    usage: dict[str, list[ModuleUsage]]  # use of experts by module, over groups of tokens
    modules: list[str]  # names of the modules with a row and a column in `agreement`
    agreement: list[list[float]]  # Cramér's V of every pair of them, see `mola.insight.agreement.AgreementCounter`
    # of some samples, by their number: `module`, `layer_index` and `mean_gates` over the answer's tokens
    gates: dict[int, list[dict[str, Any]]]


def look_at(
    model: Any,
    dataset: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, str]],
    token_types: Callable[[Sequence[int]], list[str]],
    examples: Collection[int] = (),
) -> Seen:
    """Use of experts over samples, which are read one at a time: there is no padding to leave out.

    Args:
        model: with an adapter, in eval mode.
        dataset: `input_ids` and `labels` of each sample, see `mola.data.encode.encode_examples`.
        groups: column -> value of each sample, such as `{"subject": "physics"}`.
        token_types: kind of each token, see `mola.insight.token_types.TokenTypes`.
        examples: numbers of the samples whose gates are wanted.

    Returns:
        The use over `all` tokens, over those of the `prompt` and of the `answer`, over those of a kind, named
        `token=word` and so on, and over all tokens of every group, named `column=value`; agreement over all tokens.
        Modules that see another number of tokens than the sample has are counted in `all` alone.

    Raises:
        MolaError: no module has a router, or what one decides is no number.
    """
    counters: dict[str, UsageCounter] = {"all": UsageCounter()}
    agreement, gates = AgreementCounter(), {}
    samples = enumerate(zip(dataset, groups, strict=True))
    for number, (sample, group) in progress(samples, "Looking at the experts", len(groups)):
        ids = list(sample["input_ids"])
        recorded = gates_of_tokens(model, ids)
        _check_finite(recorded)
        is_answer = torch.tensor([label != IGNORED for label in sample["labels"]])
        every = torch.ones_like(is_answer)
        masks = {"prompt": ~is_answer, "answer": is_answer}
        types = token_types(ids)
        masks |= {f"token={kind}": torch.tensor([each == kind for each in types]) for kind in set(types)}
        masks |= {f"{column}={value}": every for column, value in group.items()}
        counters["all"].add(recorded)
        # Some see other tokens, such as each expert of a base model's own: nothing says which of the sample's.
        alike = [each for each in recorded if len(each.gates) == len(ids)]
        for name, mask in masks.items():
            if alike and mask.any():  # text without a prompt has no token of that
                counters.setdefault(name, UsageCounter()).add(alike, mask)
        agreement.add(recorded)
        if number in examples:
            gates[number] = [_mean_gates(each, is_answer) for each in alike]
    usage = {name: counter.usage() for name, counter in counters.items()}
    return Seen(usage, agreement.modules, agreement.cramers_v().tolist(), gates)


def _check_finite(recorded: Sequence[ModuleGates]) -> None:
    for each in recorded:
        if not torch.isfinite(each.entropies).all():
            raise MolaError(
                f"what routers decide must be finite numbers: in {each.module} they are not. In float16 this model's "
                "activations may be too large: pass --dtype bfloat16 or float32."
            )


def _mean_gates(recorded: ModuleGates, mask: torch.Tensor) -> dict[str, Any]:
    mean = recorded.gates[mask].mean(0)
    return {"module": recorded.module, "layer_index": recorded.layer_index, "mean_gates": mean.tolist()}


def to_records(rows: Sequence[ModuleUsage] | Sequence[ModuleRedundancy] | Sequence[LeftOut]) -> list[dict[str, Any]]:
    """Plain values for JSON, NaN as None."""
    return [{key: None if value != value else value for key, value in asdict(row).items()} for row in rows]

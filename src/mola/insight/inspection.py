"""What the experts of a trained adapter do on data: which tokens they process, and how alike they are."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.files.terminal import show_progress
from mola.insight.ablation import LeftOut
from mola.insight.agreement import AgreementCounter
from mola.insight.recorder import ModuleGates, gates_of_tokens
from mola.insight.redundancy import expert_distances, mean_pairwise, subspace_overlaps
from mola.insight.saved_redundancy import ModuleRedundancy
from mola.insight.usage import ModuleUsage, UsageCounter
from mola.tuner.layer import MolaLinear

# ---------------------------------------------------------------------- how alike the experts are


def measure_redundancy(model: torch.nn.Module) -> list[ModuleRedundancy]:
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


# ---------------------------------------------------------------------- which tokens they process


class TokenTypes:
    """Types of tokens by their text; each token of the vocabulary is decoded at most once."""

    def __init__(self, tokenizer: Any) -> None:
        # `all_special_ids` has only the special tokens with a name, so it lacks those of a chat template.
        added = tokenizer.added_tokens_decoder.items()
        special = {*tokenizer.all_special_ids, *(token for token, content in added if content.special)}

        @cache
        def type_of(token: int) -> str:
            return "special" if token in special else type_of_text(tokenizer.decode([token]))

        self._type_of = type_of

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """For each token `word`, `number`, `punctuation`, `space` or `special`."""
        return [self._type_of(int(token)) for token in token_ids]


def type_of_text(text: str) -> str:
    """The type of a token by its text.

    A `space` is only white space, a `word` has a letter, a `number` has a digit and no letter. Everything else is
    `punctuation`: marks, symbols, parts of a character.
    """
    if not text.strip():
        return "space"
    if any(character.isalpha() for character in text):
        return "word"
    if any(character.isnumeric() for character in text):
        return "number"
    return "punctuation"


@dataclass(frozen=True)
class RouterUse:
    """What the routers of a model decided on data."""

    usage: dict[str, list[ModuleUsage]]  # use of experts by module, over groups of tokens
    modules: list[str]  # names of the modules with a row and a column in `agreement`
    agreement: list[list[float]]  # Cramér's V of every pair of modules, see `mola.insight.agreement.AgreementCounter`
    # for some samples, by sample number: `module`, `layer_index` and `mean_gates` over the answer tokens
    gates: dict[int, list[dict[str, Any]]]


def measure_router_use(
    model: Any,
    dataset: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, str]],
    token_types: Callable[[Sequence[int]], list[str]],
    examples: Collection[int] = (),
) -> RouterUse:
    """Measure the use of experts over samples. They are processed one at a time, so there is no padding.

    Args:
        model: a model with an adapter, in eval mode.
        dataset: `input_ids` and `labels` of each sample, see `mola.data.encode.encode_examples`.
        groups: column -> value of each sample, such as `{"subject": "physics"}`.
        token_types: type of each token, see `TokenTypes`.
        examples: numbers of the samples whose gates are returned.

    Returns:
        The use over `all` tokens, over those of the `prompt` and of the `answer`, over tokens of a type, named
        `token=word` and so on, and over all tokens of every group, named `column=value`; agreement over all tokens.
        Modules whose number of tokens differs from the sample's are counted in `all` alone.

    Raises:
        MolaError: no module has a router, or a router gives values that are not finite.
    """
    counters: dict[str, UsageCounter] = {"all": UsageCounter()}
    agreement, gates = AgreementCounter(), {}
    samples = enumerate(zip(dataset, groups, strict=True))
    for number, (sample, group) in show_progress(samples, "Looking at the experts", len(groups)):
        ids = list(sample["input_ids"])
        recorded = gates_of_tokens(model, ids)
        _check_finite(recorded)
        is_answer = torch.tensor([label != IGNORED for label in sample["labels"]])
        is_any = torch.ones_like(is_answer)
        types = token_types(ids)
        masks = {"prompt": ~is_answer, "answer": is_answer}
        masks |= {f"token={kind}": torch.tensor([each == kind for each in types]) for kind in sorted(set(types))}
        masks |= {f"{column}={value}": is_any for column, value in group.items()}
        counters["all"].add(recorded)
        # The experts of a MoE base see only some tokens, and it is not known which tokens of the sample these are.
        with_all_tokens = [each for each in recorded if len(each.gates) == len(ids)]
        for name, mask in masks.items():
            if with_all_tokens and mask.any():  # a text without a prompt has no token of `prompt`
                counters.setdefault(name, UsageCounter()).add(with_all_tokens, mask)
        agreement.add(recorded)
        if number in examples:
            gates[number] = [
                {
                    "module": each.module,
                    "layer_index": each.layer_index,
                    "mean_gates": each.gates[is_answer].mean(0).tolist(),
                }
                for each in with_all_tokens
            ]
    usage = {name: counter.usage() for name, counter in counters.items()}
    return RouterUse(usage, agreement.modules, agreement.cramers_v().tolist(), gates)


def _check_finite(recorded: Sequence[ModuleGates]) -> None:
    for each in recorded:
        if not torch.isfinite(each.entropies).all():
            raise MolaError(
                f"router decisions must be finite numbers: in {each.module} they are not. In float16 this model's "
                "activations may be too large: pass --dtype bfloat16 or float32."
            )


def to_records(rows: Sequence[ModuleUsage] | Sequence[ModuleRedundancy] | Sequence[LeftOut]) -> list[dict[str, Any]]:
    """The rows as plain values for JSON; NaN becomes None."""
    return [{key: None if value != value else value for key, value in asdict(row).items()} for row in rows]

"""Numbers of experts from scores, of layers or of single modules: at exactly a budget, in their places or shuffled."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mola.allocation.measured import ModuleScore, Scores
from mola.allocation.rounding import experts_from_scores
from mola.architecture.layer_stacks import module_kinds


@dataclass(frozen=True)
class Rule:
    """How scores become numbers; the fields are options of `mola allocate`."""

    budget: int
    min_experts: int = 1
    max_experts: int | None = None
    beta: float | None = None  # None for scores that are proportions already
    shuffle: int | None = None

    def numbers(self, scores: Sequence[float], groups: Sequence[str], budget: int | None = None) -> list[int]:
        """One for each score; with `shuffle` they change places within each group."""
        largest = max(scores, default=0.0)
        if self.beta is not None and largest > 0:  # divided by the largest first, so that nothing overflows
            scores = [(score / largest) ** self.beta for score in scores]
        experts = experts_from_scores(scores, budget or self.budget, self.min_experts, self.max_experts)
        if self.shuffle is not None:
            generator, places = random.Random(self.shuffle), defaultdict(list)
            for place, group in enumerate(groups):
                places[group].append(place)
            for own in places.values():
                mixed = [experts[place] for place in own]
                generator.shuffle(mixed)
                for place, number in zip(own, mixed, strict=True):
                    experts[place] = number
        return experts


@dataclass(frozen=True)
class ModuleExperts:
    """What one module gets."""

    module: str  # name in the base model
    layer_index: int
    score: float
    num_experts: int


def numbers_of_layers(scores: Scores, rule: Rule) -> list[int]:
    """One number per layer; 1, which is no part of the budget, where a layer has no score."""
    counted = [score for score in scores if score is not None]
    experts = iter(rule.numbers(counted, [""] * len(counted)))
    return [1 if score is None else next(experts) for score in scores]


def numbers_of_modules(found: Sequence[ModuleScore], rule: Rule) -> list[ModuleExperts]:
    """One number per module, together as many as when every layer gets the same at the budget.

    A budget of B is thus B for each of the M kinds of linears, `B * M` in all where every layer has the same kinds.
    """
    found = sorted(found, key=lambda each: each.layer_index)
    counts = Counter(each.layer_index for each in found).values()
    bounds = rule.min_experts, rule.max_experts
    total = sum(map(int.__mul__, counts, experts_from_scores([1.0] * len(counts), rule.budget, *bounds)))
    kinds = [*module_kinds(each.module for each in found).values()]
    numbers = rule.numbers([each.score for each in found], kinds, total)
    return [ModuleExperts(*each, number) for each, number in zip(found, numbers, strict=True)]


def layers_and_pattern(
    modules: Sequence[ModuleExperts], scores: Scores, rule: Rule
) -> tuple[list[int], dict[str, int]]:
    """`num_experts` and `num_experts_pattern` that give every module its number.

    The former are the means of the layers, rounded so that they add up to the budget; the latter names the others.
    """
    of_layer: list[list[int]] = [[] for _ in scores]
    for each in modules:
        of_layer[each.layer_index].append(each.num_experts)
    means = [sum(own) / len(own) if own else None for own in of_layer]
    layers = numbers_of_layers(means, Rule(rule.budget, rule.min_experts, rule.max_experts))
    return layers, {each.module: each.num_experts for each in modules if each.num_experts != layers[each.layer_index]}

"""Computes numbers of experts from scores, for layers or for single linears, with exactly the budget as their sum."""

import math
import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mola.allocation.measured import LayerScores, ModuleScore
from mola.architecture.layer_names import module_kinds
from mola.errors import MolaError


def experts_from_scores(
    scores: Sequence[float], budget: int, min_experts: int = 1, max_experts: int | None = None
) -> list[int]:
    r"""Compute numbers of experts in proportion to scores, with bounds and an exact sum.

        x_l = min(max(c * s_l, min_experts), max_experts)    with c such that the x_l add up to the budget

    Each layer gets the integer part of `x_l`. The rest of the budget goes to the layers with the largest fractional
    parts, one expert each; among equal fractions the higher layer comes first (largest remainder method). So a layer
    with a larger score never gets fewer experts, and layers with equal scores differ by at most one. A factor common
    to all scores changes nothing. The computation uses exact fractions. A layer of score 0 gets `min_experts`, and
    more only if all others are full.

    Args:
        scores: one per layer, at least 0, lowest layer first.
        budget: sum of the numbers.
        min_experts: lowest number of experts in a layer.
        max_experts: highest number of experts in a layer; None for no bound.

    Returns:
        One integer per layer.

    Raises:
        MolaError: scores are missing, negative, not finite or all zero, or the bounds exclude the budget.
    """
    if not scores or not all(math.isfinite(score) and score >= 0 for score in scores) or not any(scores):
        raise MolaError(f"scores must be finite, at least 0 and not all 0, one per layer: got {list(scores)}.")
    check_budget(len(scores), budget, min_experts, max_experts)
    most = budget if max_experts is None else max_experts
    shares = _bounded_shares([Fraction(score) for score in scores], budget, min_experts, most)
    experts = [math.floor(share) for share in shares]
    by_fraction = sorted(range(len(shares)), key=lambda layer: (shares[layer] - experts[layer], layer), reverse=True)
    for layer in by_fraction[: budget - sum(experts)]:
        experts[layer] += 1
    return experts


def check_budget(num_layers: int, budget: int, min_experts: int, max_experts: int | None) -> None:
    """Check that a budget can be distributed exactly over a number of layers.

    Raises:
        MolaError: a bound is out of range, or the bounds exclude the budget; the message names the possible budgets.
    """
    if min_experts < 1:
        raise MolaError(f"`min_experts` must be at least 1: got {min_experts}.")
    if max_experts is not None and max_experts < min_experts:
        raise MolaError(f"`max_experts` must be at least `min_experts` ({min_experts}): got {max_experts}.")
    lowest = num_layers * min_experts
    if budget < lowest or (max_experts is not None and budget > num_layers * max_experts):
        layers = f"{num_layers} layer" + ("s" if num_layers != 1 else "")
        rule = f"at least {lowest}" if max_experts is None else f"between {lowest} and {num_layers * max_experts}"
        bounds = f"`min_experts` {min_experts}" + ("" if max_experts is None else f" and `max_experts` {max_experts}")
        raise MolaError(
            f"`budget` must be {rule}, which {layers} with {bounds} allow: got {budget}. It is the number of experts "
            "added up over the layers."
        )


def _bounded_shares(scores: list[Fraction], budget: int, low: int, high: int) -> list[Fraction]:
    """The `x_l` of `experts_from_scores`: their sum is piecewise linear in `c`, with known corners."""
    positive = [score for score in scores if score > 0]
    corners = sorted({Fraction(bound) / score for score in positive for bound in (low, high)})
    index = bisect_right(corners, Fraction(budget), key=lambda corner: _total(scores, corner, low, high))
    if index == len(corners):
        # All layers with a positive score are full: the others share the rest.
        rest, others = budget - high * len(positive), len(scores) - len(positive)
        return [Fraction(high) if score > 0 else Fraction(rest, others) for score in scores]
    start, end = corners[index - 1 : index + 1]
    below, above = (_total(scores, corner, low, high) for corner in (start, end))
    factor = start + (end - start) * (budget - below) / (above - below)
    return [min(max(factor * score, Fraction(low)), Fraction(high)) for score in scores]


def _total(scores: list[Fraction], factor: Fraction, low: int, high: int) -> Fraction:
    return sum((min(max(factor * score, Fraction(low)), Fraction(high)) for score in scores), Fraction(0))


@dataclass(frozen=True)
class Rule:
    """How scores become numbers; the fields are options of `mola allocate`."""

    budget: int
    min_experts: int = 1
    max_experts: int | None = None
    beta: float | None = None  # None for scores that are proportions already
    shuffle: int | None = None

    def numbers(self, scores: Sequence[float], groups: Sequence[str], budget: int | None = None) -> list[int]:
        """One number for each score, `budget` in all; with `shuffle` the numbers are shuffled within each group."""
        largest = max(scores, default=0.0)
        if self.beta is not None and largest > 0:  # dividing by the largest first keeps powers from overflowing
            scores = [(score / largest) ** self.beta for score in scores]
        experts = experts_from_scores(scores, budget or self.budget, self.min_experts, self.max_experts)
        if self.shuffle is not None:
            generator, members = random.Random(self.shuffle), defaultdict(list)
            for index, group in enumerate(groups):
                members[group].append(index)
            for indices in members.values():
                shuffled = [experts[index] for index in indices]
                generator.shuffle(shuffled)
                for index, number in zip(indices, shuffled, strict=True):
                    experts[index] = number
        return experts


@dataclass(frozen=True)
class ModuleExperts:
    """Score and number of experts of one linear."""

    module: str  # name in the base model
    layer_index: int
    score: float
    num_experts: int


def numbers_of_layers(scores: LayerScores, rule: Rule) -> list[int]:
    """One number per layer. A layer without a score gets 1, which does not count for the budget."""
    counted = [score for score in scores if score is not None]
    experts = iter(rule.numbers(counted, [""] * len(counted)))
    return [1 if score is None else next(experts) for score in scores]


def numbers_of_modules(found: Sequence[ModuleScore], rule: Rule) -> list[ModuleExperts]:
    """Distribute experts over linears in proportion to their scores.

    The total equals that of a uniform allocation in which layers share the budget B and every linear gets the number of
    its layer. With M kinds of linears in every layer the total is `B * M`.
    """
    found = sorted(found, key=lambda each: each.layer_index)
    counts = Counter(each.layer_index for each in found).values()
    uniform = experts_from_scores([1.0] * len(counts), rule.budget, rule.min_experts, rule.max_experts)
    total = sum(count * experts for count, experts in zip(counts, uniform, strict=True))
    kinds = [*module_kinds(each.module for each in found).values()]
    numbers = rule.numbers([each.score for each in found], kinds, total)
    return [ModuleExperts(*each, number) for each, number in zip(found, numbers, strict=True)]


def layers_and_pattern(
    modules: Sequence[ModuleExperts], scores: LayerScores, rule: Rule
) -> tuple[list[int], dict[str, int]]:
    """`num_experts` and `num_experts_pattern` that together give every linear its number.

    The first holds the layers' means, rounded so that they add up to the budget. The second names the linears whose
    number differs from that of their layer.
    """
    of_layer: list[list[int]] = [[] for _ in scores]
    for each in modules:
        of_layer[each.layer_index].append(each.num_experts)
    means = [sum(own) / len(own) if own else None for own in of_layer]
    layers = numbers_of_layers(means, Rule(rule.budget, rule.min_experts, rule.max_experts))
    return layers, {each.module: each.num_experts for each in modules if each.num_experts != layers[each.layer_index]}

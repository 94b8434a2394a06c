"""Whole numbers of experts from scores, at exactly a budget. Pure functions, no torch."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

from mola.errors import MolaError


def experts_from_scores(
    scores: Sequence[float], budget: int, min_experts: int = 1, max_experts: int | None = None
) -> list[int]:
    r"""Numbers of experts in proportion to scores, with bounds and an exact sum.

        x_l = min(max(c * s_l, min_experts), max_experts)    with c such that the x_l add up to the budget

    Each layer gets the whole part of `x_l`; what is left of the budget goes, one expert each, to the layers with the
    largest fractions, the higher layer first where fractions are equal (largest remainder). So a layer with a larger
    score never gets fewer experts, layers with equal scores differ by at most one, and a factor common to all scores
    changes nothing. Computed in fractions: no rounding decides. Scores of zero get `min_experts` as long as the others
    have room for the rest.

    Args:
        scores: one per layer, at least 0, lowest layer first.
        budget: what the numbers add up to.
        min_experts: fewest experts of a layer.
        max_experts: most experts of a layer; None for no bound.

    Returns:
        One integer per layer.

    Raises:
        MolaError: no scores, a score is negative or not finite, all are zero, or the bounds exclude the budget.
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
    """Check that a budget can be spent exactly on so many layers.

    Raises:
        MolaError: a bound is out of range, or they exclude the budget; says which budgets they allow.
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
    """The `x_l` of `experts_from_scores`: their sum grows with `c` in straight pieces, between known corners."""
    positive = [score for score in scores if score > 0]
    corners = sorted({Fraction(bound) / score for score in positive for bound in (low, high)})
    place = bisect_right(corners, Fraction(budget), key=lambda corner: _total(scores, corner, low, high))
    if place == len(corners):
        # All layers with a score are full: the others share the rest.
        rest, others = budget - high * len(positive), len(scores) - len(positive)
        return [Fraction(high) if score > 0 else Fraction(rest, others) for score in scores]
    start, end = corners[place - 1 : place + 1]
    below, above = (_total(scores, corner, low, high) for corner in (start, end))
    factor = start + (end - start) * (budget - below) / (above - below)
    return [min(max(factor * score, Fraction(low)), Fraction(high)) for score in scores]


def _total(scores: list[Fraction], factor: Fraction, low: int, high: int) -> Fraction:
    return sum((min(max(factor * score, Fraction(low)), Fraction(high)) for score in scores), Fraction(0))

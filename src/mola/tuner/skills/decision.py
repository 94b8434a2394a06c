"""Which skill is asked: one decision per prompt, from the statistics that the skills keep.

A part of a prompt has for each skill, with its mean `m_k`, the mean `m_0` of general text and a covariance `S`,

    P = (S + c mean(diag S) I)^-1
    w_k = P (m_k - m_0)        b_k = -(m_k + m_0)^T w_k / 2        u_k = w_k phi + b_k

This is the logarithm of how much likelier the part is in the skill than in general text, for normal distributions with
the covariance S. `whole_k` has the means and the covariance of whole prompts. `part_k` has those of whole prompts and
halves, whichever mean is the best. General text is in both covariances: what varies in it tells no skills apart.

    S of whole = mean over skills of (whole prompts) + 1/2 general text                  c = 0.1
    S of part  = mean over skills of (whole prompts + 2 halves) / 3 + general text       c = 0.3
    score_k    = max(0, whole_k(prompt)) + max(0, part_k of the prompt or of its best window)

So a question is known among text of other kinds: that text lowers the first value, and leaves the second as it is.
The skill with the largest score is asked if its margin is above the threshold, else the base model answers alone. The
margin is the mean of the two `u_k / s_k`, where `s_k` is the value of `u_k` at the skill's own mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mola.errors import MolaError
from mola.tuner.skills.statistics import (
    NUM_PARTS,
    WHOLE,
    GeneralStatistics,
    PromptBatch,
    SkillStatistics,
    prompt_features,
)

# Chosen on further rows of six tasks, as they are and shifted: see "decisions on real text" in docs/research/skills.md.
_GENERAL_IN_WHOLE, _GENERAL_IN_PART = 0.5, 1.0
_RIDGE_OF_WHOLE, _RIDGE_OF_PART = 0.1, 0.3


@dataclass(frozen=True)
class Decisions:
    """Who answers each prompt.

    Attributes:
        names: the skill of each row; None if the base model answers alone.
        scores: of each row and skill, in the order of `Decider.names`, `(B, K)`.
        margins: of each row's best skill: 1 at the mean of the skill, -1 at that of general text, `(B)`.
    """

    names: list[str | None]
    scores: Tensor
    margins: Tensor


class Decider:
    """Decides which skill is asked.

    Args:
        general: statistics of general text.
        skills: statistics of each skill. The order does not matter: sums are made in the order of the names.
        threshold: `t`; a prompt goes to the base model if its margin is not above it.

    Raises:
        MolaError: no skill.
    """

    def __init__(self, general: GeneralStatistics, skills: Mapping[str, SkillStatistics], threshold: float) -> None:
        if not skills:
            raise MolaError("a decision needs at least one skill: got none. Add a skill first.")
        self.names = sorted(skills)
        self.threshold = threshold
        self.held_out = {name: list(skills[name].held_out.float()[:, None]) for name in self.names}
        kept = [skills[name] for name in self.names]
        means = torch.stack([each.means for each in kept]).double()
        whole = _covariance([(each.whole_directions, each.whole_rest) for each in kept])
        half = _covariance([(each.half_directions, each.half_rest) for each in kept])
        text = _covariance([(general.directions, general.rest)])
        base = general.mean.double()
        self._whole = _Lines(means[:, :1], base, whole + _GENERAL_IN_WHOLE * text, _RIDGE_OF_WHOLE)
        self._part = _Lines(means, base, (whole + 2 * half) / 3 + _GENERAL_IN_PART * text, _RIDGE_OF_PART)

    def decide(self, batch: PromptBatch) -> Decisions:
        """Who answers each prompt of a batch.

        Raises:
            MolaError: a row has no content.
        """
        return self.decide_features(prompt_features(batch))

    def decide_features(self, features: Sequence[Tensor]) -> Decisions:
        """Like `decide`, from the features of the prompts."""
        found = [self._score(each) for each in features]
        scores, margins = (torch.stack(each) for each in zip(*found, strict=True))
        best = scores.argmax(1)  # of equal scores the first
        margins = margins.gather(1, best[:, None])[:, 0]
        pairs = zip(best.tolist(), margins.tolist(), strict=True)
        names = [self.names[index] if margin > self.threshold else None for index, margin in pairs]
        return Decisions(names, scores, margins)

    def _score(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and margins `(K)` of one prompt."""
        whole, whole_margins = self._whole(features[:1])
        parts, part_margins = self._part(torch.cat([features[:1], features[NUM_PARTS:]]))
        scores = whole[WHOLE].clamp(min=0) + parts.amax(0).clamp(min=0)
        # A prompt that is like general text everywhere has scores of 0.
        scores = torch.where(scores.max() > 0, scores, whole[WHOLE])
        return scores, (whole_margins[WHOLE] + part_margins.amax(0)) / 2


class _Lines:
    """`u_k` and `u_k / s_k` of parts of a prompt; of a skill's means the one with the largest `u_k` counts."""

    def __init__(self, means: Tensor, base: Tensor, covariance: Tensor, ridge: float) -> None:
        added = ridge * covariance.diagonal().mean() * torch.eye(len(base), dtype=torch.float64)
        away = (means - base).flatten(0, 1)
        weights = torch.linalg.solve(covariance + added, away.T).T
        offsets = -((means + base).flatten(0, 1) * weights).sum(1) / 2
        self._weights, self._offsets = weights.float(), offsets.float()
        self._scales = ((weights * away).sum(1) / 2).float()
        self._num_means = means.shape[1]

    def __call__(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors `(parts, K)`."""
        values = parts @ self._weights.T + self._offsets
        margins = values / self._scales
        values, best = values.unflatten(1, (-1, self._num_means)).max(2)
        return values, margins.unflatten(1, (-1, self._num_means)).gather(2, best[..., None])[..., 0]


def _covariance(kept: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of covariances, each kept as its main directions and the remaining variance; summed in their order."""
    size = kept[0][0].shape[1]
    total = torch.zeros(size, size, dtype=torch.float64)
    for directions, rest in kept:
        total.addmm_(directions.double().T, directions.double())
        total.diagonal().add_(rest.double())
    return total / len(kept)


def suggest_threshold(
    general: GeneralStatistics, skills: Mapping[str, SkillStatistics], reject_rate: float = 0.02
) -> float:
    """The threshold below which a share of prompts like the skills' own held-out ones are expected.

    The lowest of n margins has `1 / (n + 1)` of further prompts below it, the second lowest twice as many. Between
    margins it is interpolated. With fewer than `1 / reject_rate - 1` margins the lowest one counts, so one prompt sets
    the threshold. Held-out prompts are kept without their windows, which only raise a margin: of prompts with windows
    fewer are below.

    Args:
        general: statistics of general text.
        skills: statistics of each skill.
        reject_rate: the share, from 0 up to 1.

    Returns:
        The threshold; 0 if no skill has a prompt that is held out.
    """
    decider = Decider(general, skills, float("-inf"))
    features = [each for name in decider.names for each in decider.held_out[name]]
    if not features:
        return 0.0
    margins = decider.decide_features(features).margins.sort().values.tolist()
    place = min(max(reject_rate * (len(margins) + 1) - 1, 0), len(margins) - 1)
    low, high = margins[int(place)], margins[min(int(place) + 1, len(margins) - 1)]
    # Just below, so that the prompt with this margin is kept after rounding, too.
    return low + (place - int(place)) * (high - low) - 1e-4


@dataclass(frozen=True)
class MovedDecision:
    """A held-out prompt whose answer comes from elsewhere now.

    Attributes:
        skill: the skill that the prompt is of.
        index: its place among the skill's held-out prompts.
        before: who was asked.
        after: who is asked now.
    """

    skill: str
    index: int
    before: str | None
    after: str | None


def moved_decisions(before: Decider, after: Decider) -> list[MovedDecision]:
    """Decisions on the held-out prompts of skills that both have, where they differ.

    Args:
        before: before a change, such as a skill added.
        after: after it.
    """
    moved = []
    for skill in before.names:
        if skill in after.held_out and (features := before.held_out[skill]):
            pairs = zip(before.decide_features(features).names, after.decide_features(features).names, strict=True)
            moved += [MovedDecision(skill, index, old, new) for index, (old, new) in enumerate(pairs) if old != new]
    return moved


def confusion(decider: Decider, prompts: Mapping[str, Iterable[PromptBatch]]) -> dict[str, dict[str | None, int]]:
    """How many prompts of each skill go to whom.

    Args:
        decider: who decides.
        prompts: prompts by the skill they are of.

    Returns:
        For each key of `prompts` the number of prompts by who is asked; None is the base model.
    """
    table: dict[str, dict[str | None, int]] = {}
    for skill, batches in prompts.items():
        counts = table[skill] = {}
        for batch in batches:
            for name in decider.decide(batch).names:
                counts[name] = counts.get(name, 0) + 1
    return table

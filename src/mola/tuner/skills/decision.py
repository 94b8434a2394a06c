"""Which skill is asked: one decision per prompt, from the statistics that the skills keep.

    S   = mean over skills of their covariance + 1/2 covariance of general text
    P   = (S + 0.1 mean(diag S) I)^-1
    w_k = P (m_k - mu0)        b_k = -(m_k + mu0)^T w_k / 2
    u_k = w_k phi + b_k        s_k = w_k m_k + b_k

The skill with the largest `u_k` is asked if `u_k > t s_k`; else the base model answers alone. `u_k` is the logarithm of
how much likelier a prompt is in the skill than in general text, for normal distributions with the covariance S.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mola.errors import MolaError
from mola.tuner.skills.statistics import GeneralStatistics, PromptBatch, SkillStatistics, prompt_features

_GENERAL_SHARE = 0.5
_RIDGE = 0.1

Name = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Decisions:
    """Who answers each prompt.

    Attributes:
        names: the skill of each row; None if the base model answers alone. With `top_k` 2 a tuple of one or two names,
            the better one first.
        scores: `u_k` of each row and skill, in the order of `Decider.names`, `(B, K)`.
        margins: `u_k / s_k` of each row's best skill: 1 at the mean of the skill, -1 at that of general text, `(B)`.
    """

    names: list[Name]
    scores: Tensor
    margins: Tensor


class Decider:
    """Decides which skill is asked.

    Args:
        general: statistics of general text.
        skills: statistics of each skill. The order does not matter: sums are made in the order of the names.
        threshold: `t`; a prompt goes to the base model if its margin is not above it.
        top_k: number of skills to ask, 1 or 2. The second is asked only if it is above the threshold, too.

    Raises:
        MolaError: no skill, or `top_k` is not 1 or 2.
    """

    def __init__(
        self, general: GeneralStatistics, skills: Mapping[str, SkillStatistics], threshold: float, top_k: int = 1
    ) -> None:
        if not skills:
            raise MolaError("a decision needs at least one skill: got none. Add a skill first.")
        if top_k not in (1, 2):
            raise MolaError(f"`top_k` must be 1 or 2: got {top_k!r}.")
        self.names = sorted(skills)
        self.threshold = threshold
        self.top_k = top_k
        self.held_out = {name: skills[name].held_out for name in self.names}
        means = torch.stack([skills[name].mean for name in self.names]).double()
        covariance = sum(_covariance(skills[name]) for name in self.names) / len(self.names)
        covariance = covariance + _GENERAL_SHARE * _covariance(general)
        ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        base = general.mean.double()
        rows = torch.linalg.solve(covariance + ridge, (means - base).T).T
        offsets = -((means + base) * rows).sum(1) / 2
        self._rows, self._offsets = rows.float(), offsets.float()
        self._scales = ((rows * means).sum(1) + offsets).float()

    def decide(self, batch: PromptBatch) -> Decisions:
        """Who answers each prompt of a batch.

        Raises:
            MolaError: a row has no content.
        """
        return self.decide_features(prompt_features(batch))

    def decide_features(self, features: Tensor) -> Decisions:
        """Like `decide`, from the features `(B, d)` of the prompts."""
        scores = features.float().cpu() @ self._rows.T + self._offsets
        order = scores.sort(dim=1, descending=True, stable=True)[1][:, : self.top_k]
        margins = scores.gather(1, order) / self._scales[order]
        names: list[Name] = []
        for indices, values in zip(order.tolist(), margins.tolist(), strict=True):
            asked = [
                self.names[index] for index, margin in zip(indices, values, strict=True) if margin > self.threshold
            ]
            best_is_known = values[0] > self.threshold
            if not best_is_known:
                names.append(None)
            else:
                names.append(asked[0] if self.top_k == 1 else tuple(asked))
        return Decisions(names, scores, margins[:, 0])


def _covariance(statistics: SkillStatistics | GeneralStatistics) -> Tensor:
    directions = statistics.directions.double()
    return directions.T @ directions + statistics.rest.double() * torch.eye(directions.shape[1], dtype=torch.float64)


def suggest_threshold(
    general: GeneralStatistics, skills: Mapping[str, SkillStatistics], reject_rate: float = 0.02
) -> float:
    """The largest threshold that sends at most a share of the skills' own held-out prompts to the base model.

    Args:
        general: statistics of general text.
        skills: statistics of each skill.
        reject_rate: the share, from 0 up to 1.

    Returns:
        The threshold; 0 if no skill has a prompt that is held out.

    Raises:
        MolaError: `reject_rate` is not a share.
    """
    if not 0 <= reject_rate < 1:
        raise MolaError(
            f"`reject_rate` must be at least 0 and below 1: got {reject_rate!r}. Pass a share such as 0.02."
        )
    decider = Decider(general, skills, float("-inf"))
    features = torch.cat([decider.held_out[name] for name in decider.names])
    if not len(features):
        return 0.0
    margins = decider.decide_features(features).margins.sort().values
    rejected = int(reject_rate * len(margins))
    # Just below the first margin that is kept, so that this prompt is kept after rounding, too.
    return float(margins[rejected]) - 1e-4


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
    before: Name
    after: Name


def moved_decisions(before: Decider, after: Decider) -> list[MovedDecision]:
    """Decisions on the held-out prompts of skills that both have, where they differ.

    Args:
        before: before a change, such as a skill added.
        after: after it.
    """
    moved = []
    for skill in before.names:
        if skill in after.held_out and len(features := before.held_out[skill]):
            pairs = zip(before.decide_features(features).names, after.decide_features(features).names, strict=True)
            moved += [MovedDecision(skill, index, old, new) for index, (old, new) in enumerate(pairs) if old != new]
    return moved


def confusion(decider: Decider, prompts: Mapping[str, Iterable[PromptBatch]]) -> dict[str, dict[Name, int]]:
    """How many prompts of each skill go to whom.

    Args:
        decider: who decides.
        prompts: prompts by the skill they are of.

    Returns:
        For each key of `prompts` the number of prompts by who is asked; None is the base model.
    """
    table: dict[str, dict[Name, int]] = {}
    for skill, batches in prompts.items():
        counts = table[skill] = {}
        for batch in batches:
            for name in decider.decide(batch).names:
                counts[name] = counts.get(name, 0) + 1
    return table

"""What a skill keeps of the prompts it was trained on, and what a base model keeps of general text.

The feature of a prompt is the mean over its content tokens of the input of decoder layer L, each token divided by its
own root mean square. All sums are per skill, so adding a skill changes nothing that other skills keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mola.errors import MolaError

_DIRECTIONS = 16  # of a skill's prompts, beside which the variance is taken to be the same in all directions
_GENERAL_DIRECTIONS = 64
_HELD_OUT_EVERY = 5
_MAX_HELD_OUT = 20


class PromptBatch(NamedTuple):
    """Prompts at the layer where the decision is made.

    Attributes:
        hidden: input of decoder layer L, `(B, T, d)`.
        content: which tokens are the user's content, `(B, T)` of bool.
        input_ids: `(B, T)`.
    """

    hidden: Tensor
    content: Tensor
    input_ids: Tensor


def prompt_features(batch: PromptBatch) -> Tensor:
    """Mean of the content tokens' hidden states, each divided by its root mean square: `(B, d)` in float32.

    A row's feature does not depend on the rows and the padding beside it.

    Raises:
        MolaError: a row has no content.
    """
    rows = []
    for hidden, content in zip(batch.hidden, batch.content, strict=True):
        tokens = hidden[content].float()
        if not len(tokens):
            raise MolaError("`content` must hold at least one token of every prompt: a row has none.")
        rows.append((tokens * tokens.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).mean(0))
    return torch.stack(rows)


@dataclass(frozen=True)
class SkillStatistics:
    """What a skill keeps of its prompts.

    Attributes:
        mean: mean feature, `(d)`.
        directions: the main directions of the prompts' covariance, scaled so that `directions.T @ directions` is its
            part, `(r, d)`.
        rest: the remaining variance for each of the d dimensions, a scalar.
        held_out: features of prompts that the other tensors do not contain, `(h, d)`; for thresholds and for decisions
            that move.
        count: number of prompts measured, those held out included.
    """

    mean: Tensor
    directions: Tensor
    rest: Tensor
    held_out: Tensor
    count: Tensor

    @classmethod
    def measure(cls, batches: Iterable[PromptBatch]) -> Self:
        """Statistics of a skill's prompts.

        Every fifth prompt is held out, at most 20.

        Args:
            batches: the skill's prompts. Their order matters; how they are divided into batches does not.

        Raises:
            MolaError: there is no prompt, or a prompt has no content.
        """
        return cls.of_features(_features(batches))

    @classmethod
    def of_features(cls, features: Tensor) -> Self:
        """Like `measure`, from the features `(N, d)` of the prompts."""
        held_out = torch.zeros(len(features), dtype=torch.bool)
        held_out[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] = True
        held_out &= held_out.cumsum(0) <= _MAX_HELD_OUT
        mean, directions, rest = _moments(features[~held_out], _DIRECTIONS)
        return cls(mean, directions, rest, features[held_out], torch.tensor(len(features)))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write into a file, by name."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The statistics that `tensors` gave.

        Raises:
            MolaError: a tensor is missing, or is of a name that this version does not know.
        """
        return cls(**_check_names(cls, tensors))


@dataclass(frozen=True)
class GeneralStatistics:
    """What a base model keeps of general text, once for all skills.

    Attributes:
        mean: mean feature, `(d)`.
        directions: the main directions of the covariance, as in `SkillStatistics`, `(r, d)`.
        rest: the remaining variance for each of the d dimensions, a scalar.
        count: number of texts measured.
    """

    mean: Tensor
    directions: Tensor
    rest: Tensor
    count: Tensor

    @classmethod
    def measure(cls, batches: Iterable[PromptBatch]) -> Self:
        """Statistics of general text.

        Args:
            batches: texts of `general_texts`, without a template. Their order matters; how they are divided into
                batches does not.

        Raises:
            MolaError: there is no text, or a text has no content.
        """
        return cls.of_features(_features(batches))

    @classmethod
    def of_features(cls, features: Tensor) -> Self:
        """Like `measure`, from the features `(N, d)` of the texts."""
        return cls(*_moments(features, _GENERAL_DIRECTIONS), torch.tensor(len(features)))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write into a file, by name."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The statistics that `tensors` gave.

        Raises:
            MolaError: a tensor is missing, or is of a name that this version does not know.
        """
        return cls(**_check_names(cls, tensors))


def _features(batches: Iterable[PromptBatch]) -> Tensor:
    rows = [prompt_features(batch).cpu() for batch in batches]
    if not rows:
        raise MolaError("a skill is measured on at least one prompt: got none. Pass data of the skill.")
    return torch.cat(rows)


def _moments(features: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, main directions and remaining variance for each dimension; sums in float64."""
    values = features.double()
    mean = values.mean(0)
    _, sizes, main = torch.linalg.svd((values - mean) / len(values) ** 0.5, full_matrices=False)
    rest = sizes[directions:].square().sum() / len(mean)
    scaled = sizes[:directions, None] * main[:directions]
    return mean.float(), scaled.float(), rest.float()


def _check_names(cls: type, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wanted = set(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    if set(tensors) != wanted:
        raise MolaError(
            f"the statistics must hold {', '.join(sorted(wanted))}: got {', '.join(sorted(tensors)) or 'nothing'}. Add "
            "the skill again with this version."
        )
    return dict(tensors)

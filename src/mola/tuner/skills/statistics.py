"""What a skill keeps of the prompts it was trained on, and what a base model keeps of general text.

The features of a prompt are means of the input of decoder layer L over parts of its content, each token divided by
its own root mean square. The parts are the whole, each half, and windows that overlap. In a causal
model the first half is also what a prompt would be that ends there, so that halves cost no pass of their own.

All sums are per skill, so adding a skill changes nothing that other skills keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from mola.errors import MolaError

WHOLE, HALVES, NUM_PARTS = 0, slice(1, 3), 3  # rows of a prompt's features, before those of the windows
_WINDOW, _STRIDE = 16, 8  # tokens
_DIRECTIONS = 64  # of a covariance, beside which the variance is taken to be the same in all directions
_HELD_OUT_EVERY = 5
_MAX_HELD_OUT = 16
_STORED = torch.float16  # of directions and features: halves the file, and moves scores by less than a thousandth


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


def prompt_features(batch: PromptBatch) -> list[Tensor]:
    """Features of each prompt, on the CPU.

    A prompt's features do not depend on the rows and the padding beside it.

    Returns:
        `(3 + windows, d)` in float32 for each row of the batch: means over the whole content, its first and its second
        half, and windows of 16 tokens that begin 8 tokens apart. Content of up to 16 tokens has no windows.

    Raises:
        MolaError: a row has no content.
    """
    return [_parts(hidden[content]) for hidden, content in zip(batch.hidden, batch.content, strict=True)]


def _parts(tokens: Tensor) -> Tensor:
    tokens = tokens.float()
    length = len(tokens)
    if not length:
        raise MolaError("`content` must hold at least one token of every prompt: a row has none.")
    tokens = tokens * tokens.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    middle = (length + 1) // 2
    parts = [tokens.mean(0), tokens[:middle].mean(0), tokens[min(middle, length - 1) :].mean(0)]
    if length > _WINDOW:
        windows = tokens.unfold(0, _WINDOW, _STRIDE).mean(-1)
        parts += [*windows, tokens[-_WINDOW:].mean(0)]
    return torch.stack(parts).cpu()


@dataclass(frozen=True)
class SkillStatistics:
    """What a skill keeps of its prompts.

    A covariance is kept as its main directions, scaled so that `directions.T @ directions` is their part of it, and the
    remaining variance for each of the d dimensions.

    Attributes:
        means: mean features of whole prompts, first halves and second halves, `(3, d)`.
        whole_directions: of the covariance of whole prompts, `(r, d)`.
        whole_rest: a scalar.
        half_directions: of the covariance of halves around their own means, `(r, d)`.
        half_rest: a scalar.
        held_out: features of whole prompts that the other tensors do not contain, `(h, d)`; for thresholds and for
            decisions that move.
        count: number of prompts measured, those held out included.
    """

    means: Tensor
    whole_directions: Tensor
    whole_rest: Tensor
    half_directions: Tensor
    half_rest: Tensor
    held_out: Tensor
    count: Tensor

    @classmethod
    def measure(cls, batches: Iterable[PromptBatch]) -> Self:
        """Statistics of a skill's prompts.

        Every fifth prompt is held out, at most 16.

        Args:
            batches: the skill's prompts. Their order matters; how they are divided into batches does not.

        Raises:
            MolaError: there is no prompt, or a prompt has no content.
        """
        return cls.of_features([each for batch in batches for each in prompt_features(batch)])

    @classmethod
    def of_features(cls, features: Sequence[Tensor]) -> Self:
        """Like `measure`, from the features of the prompts."""
        parts = _first_parts(features)
        held_out = torch.zeros(len(parts), dtype=torch.bool)
        held_out[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] = True
        held_out &= held_out.cumsum(0) <= _MAX_HELD_OUT
        measured = parts[~held_out].double()
        means = measured.mean(0)
        away = measured - means
        whole = _directions(away[:, WHOLE])
        half = _directions(away[:, HALVES].flatten(0, 1))
        return cls(means.float(), *whole, *half, parts[held_out, WHOLE].to(_STORED), torch.tensor(len(parts)))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write into a file, by name."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Self:
        """The statistics that `tensors` gave.

        Raises:
            MolaError: a tensor is missing, or is of a name that this version does not know.
        """
        return cls(**_check_names(cls, tensors))


@dataclass(frozen=True)
class GeneralStatistics:
    """What a base model keeps of general text, once for all skills.

    Attributes:
        mean: mean feature of whole texts, `(d)`.
        directions: of their covariance, as in `SkillStatistics`, `(r, d)`.
        rest: a scalar.
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
        return cls.of_features([each for batch in batches for each in prompt_features(batch)])

    @classmethod
    def of_features(cls, features: Sequence[Tensor]) -> Self:
        """Like `measure`, from the features of the texts."""
        values = _first_parts(features)[:, WHOLE].double()
        mean = values.mean(0)
        return cls(mean.float(), *_directions(values - mean), torch.tensor(len(values)))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write into a file, by name."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> Self:
        """The statistics that `tensors` gave.

        Raises:
            MolaError: a tensor is missing, or is of a name that this version does not know.
        """
        return cls(**_check_names(cls, tensors))


def _first_parts(features: Sequence[Tensor]) -> Tensor:
    """Whole and halves of each prompt, `(N, 3, d)`."""
    if not features:
        raise MolaError("a skill is measured on at least one prompt: got none. Pass data of the skill.")
    return torch.stack([each[:NUM_PARTS] for each in features])


def _directions(away: Tensor) -> tuple[Tensor, Tensor]:
    """Main directions of a covariance, and the remaining variance for each dimension; sums in float64."""
    _, sizes, main = torch.linalg.svd(away / len(away) ** 0.5, full_matrices=False)
    rest = sizes[_DIRECTIONS:].square().sum() / away.shape[1]
    return (sizes[:_DIRECTIONS, None] * main[:_DIRECTIONS]).to(_STORED), rest.float()


def _check_names(cls: type, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    wanted = set(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    if set(tensors) != wanted:
        raise MolaError(
            f"the statistics must hold {', '.join(sorted(wanted))}: got {', '.join(sorted(tensors)) or 'nothing'}. Add "
            "the skill again with this version."
        )
    return {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}

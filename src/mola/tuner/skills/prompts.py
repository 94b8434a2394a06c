"""The prompts of one call of a model: which tokens count for the decision, and what a cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from mola.data.tokenized import IGNORED
from mola.errors import MolaError

_CACHES = ("cache", "past_key_values")  # the argument's name since Transformers 5.24, and before
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # arguments that bound several texts in one row


class Prompts(NamedTuple):
    """Prompts, one per row.

    Attributes:
        ids: token ids `(B, T)`.
        mask: `(B, T)`, 1 = real token.
        lengths: number of columns of each row that belong to its prompt; later columns are its answer.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: list[int]

    @classmethod
    def of_text(cls, ids: torch.Tensor, mask: torch.Tensor | None) -> Prompts:
        """Prompts without answers; without a mask no row is padded."""
        return cls(ids, torch.ones_like(ids) if mask is None else mask, [ids.shape[1]] * len(ids))

    @classmethod
    def of_call(cls, given: Mapping[str, Any]) -> Prompts:
        """The prompts of a forward pass.

        With labels, a prompt ends before the first token that counts in the loss. Without labels, or if the first token
        of a row counts, the whole row is the prompt.

        Args:
            given: arguments of the model's `forward`.

        Raises:
            MolaError: the tokens are unknown, or a row may hold several texts.
        """
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None:
            raise MolaError(
                "skills are asked by the tokens of a prompt, and `inputs_embeds` has none. Pass `input_ids`, or name "
                "the skills: `with model.skills.use(names)`."
            )
        if mask is not None and mask.shape != ids.shape:
            raise _packed_error(f"`attention_mask` has the shape {tuple(mask.shape)}")
        prompts = cls.of_text(ids, mask)
        _check_not_packed(prompts.mask, given)
        labels = given.get("labels")
        if labels is None:
            return prompts
        counts = labels != IGNORED
        first = torch.where(counts.any(1), counts.int().argmax(1), ids.shape[1])
        return prompts._replace(lengths=[length or ids.shape[1] for length in first.tolist()])

    @classmethod
    def of_generate(cls, given: Mapping[str, Any], config: GenerationConfig) -> Prompts:
        """The prompts of a call of `generate`; `config` is the model's own.

        Raises:
            MolaError: see `of_call`.
        """
        prompts = cls.of_call(given)
        padding, ends = (setting(given, config, name) for name in ("pad_token_id", "eos_token_id"))
        if given.get("attention_mask") is not None or padding is None or padding in _as_list(ends):
            return prompts
        return prompts._replace(mask=(prompts.ids != padding).long())  # like `generate` itself

    def token_ids(self) -> list[list[int]]:
        """The tokens of each prompt, without padding and answer."""
        rows = zip(self.ids.tolist(), self.mask.tolist(), self.lengths, strict=True)
        return [[ids[column] for column in range(length) if mask[column]] for ids, mask, length in rows]


def setting(given: Mapping[str, Any], config: GenerationConfig, name: str) -> Any:
    """A setting of a call of `generate`: its own, or that of its configuration, or the model's."""
    values = [given.get(name), *(getattr(each, name, None) for each in (given.get("generation_config"), config))]
    return next((value for value in values if value is not None), None)


def cache_in(given: Any) -> Any:
    """The cache of keys and values among a model's arguments or in its output; None if there is none."""
    if not isinstance(given, Mapping):
        return None
    return next((given[name] for name in _CACHES if given.get(name) is not None), None)


def tokens_in_cache(cache: Any) -> int:
    """Number of tokens in a cache of keys and values."""
    return int(cache.get_seq_length())


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_not_packed(mask: torch.Tensor, given: Mapping[str, Any]) -> None:
    """Raise MolaError if a row holds several texts, which may ask different skills."""
    if any(given.get(name) is not None for name in _PACKED):
        raise _packed_error("this batch says where texts begin within its rows")
    if bool((mask > 1).any()):
        raise _packed_error("`attention_mask` numbers the texts of a row")
    positions = given.get("position_ids")
    if positions is not None and positions.dim() == 2 and positions.shape[1] == mask.shape[1]:
        follows = (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
        if bool((follows & (positions[:, 1:] <= positions[:, :-1])).any()):
            raise _packed_error("`position_ids` begin again within a row")


def _packed_error(reason: str) -> MolaError:
    return MolaError(
        f"each row asks one skill, so a row must be one text: {reason}. Pass each text in a row of its own (no "
        "packing), or name the skills: `with model.skills.use(names)`."
    )

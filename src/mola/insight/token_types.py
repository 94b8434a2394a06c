"""What kind of text a token is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TOKEN_TYPES = ("word", "number", "punctuation", "space", "special")


class TokenTypes:
    """Kinds of tokens by their text; every token of a vocabulary is decoded once at most.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._known: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """One of `TOKEN_TYPES` for each token."""
        return [self._known.setdefault(token, self._type_of(token)) for token in map(int, token_ids)]

    def _type_of(self, token: int) -> str:
        if token in self._known:
            return self._known[token]
        return "special" if token in self._special else type_of_text(self._tokenizer.decode([token]))


def type_of_text(text: str) -> str:
    """`space` if there is nothing but white space, `word` with a letter in it, `number` with a digit and no letter, and
    `punctuation` for all else: marks, symbols, parts of a character."""
    if not text.strip():
        return "space"
    if any(character.isalpha() for character in text):
        return "word"
    if any(character.isnumeric() for character in text):
        return "number"
    return "punctuation"

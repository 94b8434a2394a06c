"""What kind of text a token is."""

from collections.abc import Sequence
from functools import cache
from typing import Any


class TokenTypes:
    """Kinds of tokens by their text; every token of a vocabulary is decoded once at most."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.items()  # a chat template's: `all_special_ids` has named ones alone
        special = {*tokenizer.all_special_ids, *(token for token, each in added if each.special)}

        @cache
        def type_of(token: int) -> str:
            return "special" if token in special else type_of_text(tokenizer.decode([token]))

        self._type_of = type_of

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """For each token `word`, `number`, `punctuation`, `space` or `special`."""
        return [self._type_of(int(token)) for token in token_ids]


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

"""Kinds of tokens: by their text, special ones by their number."""

import pytest
from tokenizers import AddedToken

from mola.insight.inspection import TokenTypes, type_of_text
from tests.conftest import build_byte_tokenizer


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, "word") for text in (" the", "a", "Ünder", "B2", "語", "n't")),
        *((text, "number") for text in ("7", " 42", "1.5", "½", "٣")),
        *((text, "punctuation") for text in (".", " (", "==", "€", "\ufffd", "_")),
        *((text, "space") for text in ("", " ", "\n\n", "\t", "\u00a0")),
    ],
)
def test_type_of_text(text, kind):
    assert type_of_text(text) == kind


def test_types_of_tokens(tiny_tokenizer):
    types = TokenTypes(tiny_tokenizer)
    ids = tiny_tokenizer("a 1.")["input_ids"]
    for _ in range(2):
        kinds = ["special", "word", "space", "number", "punctuation", "special"]
        assert types([*ids, tiny_tokenizer.eos_token_id]) == kinds


def test_chat_tokens_are_special():
    """Of a chat template, which have no name in the tokenizer."""
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|user|>", special=True), AddedToken("mola")])
    turn, word = tokenizer.convert_tokens_to_ids(["<|user|>", "mola"])
    assert turn not in tokenizer.all_special_ids
    assert TokenTypes(tokenizer)([turn, word]) == ["special", "word"]

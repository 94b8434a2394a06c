"""Kinds of tokens: by their text, special ones by their number."""

import pytest

from mola.insight.token_types import TokenTypes, type_of_text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, "word") for text in (" the", "a", "Ünder", "B2", "語", "n't")),
        *((text, "number") for text in ("7", " 42", "1.5", "½", "٣")),
        *((text, "punctuation") for text in (".", " (", "==", "€", "\ufffd", "_")),
        *((text, "space") for text in ("", " ", "\n\n", "\t", "\u00a0")),
    ],
)
def test_kind_of_a_text(text, kind):
    assert type_of_text(text) == kind


def test_kinds_of_tokens(tiny_tokenizer):
    types = TokenTypes(tiny_tokenizer)
    ids = tiny_tokenizer("a 1.")["input_ids"]
    for _ in range(2):
        assert types([*ids, tiny_tokenizer.eos_token_id]) == [
            "special",
            "word",
            "space",
            "number",
            "punctuation",
            "special",
        ]

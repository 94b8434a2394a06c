"""OpenAI's objects: where in the text each token stands."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from mola.generation.batching.sampling import TokenLogprobs
from mola.serving.answers import CompletionForm
from mola.serving.tickets import Piece, Told


def spell(token_id, is_first):
    """One token for each byte."""
    text = bytes([token_id]).decode("utf-8", "replace")
    return (f"<{token_id:x}>", None) if "\ufffd" in text else (text, [token_id])


def decode(token_ids):
    return bytes(token_ids).decode("utf-8", "replace")


@pytest.mark.parametrize("size", [1, 2, 100], ids=["every token alone", "in pairs", "as a whole"])
def test_offsets_count_characters_whatever_tokens_they_are_made_of(size):
    # The last but one is no character.
    ids = [*"aé😀b".encode(), 0x80, ord("c")]
    form = CompletionForm("model", spell, decode)
    told = [Told(token_id, TokenLogprobs(-1.0, [])) for token_id in ids]
    pieces = [Piece(0, "", told=told[start : start + size]) for start in range(0, len(told), size)]
    offsets = [each for piece in pieces for each in form.chunks(piece)[0]["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 1, 2, 2, 2, 2, 3, 4, 5]


def test_choices_have_offsets_of_their_own():
    form = CompletionForm("model", spell, decode)
    found = []
    for choice, token_id in [(0, 0xC3), (1, ord("x")), (0, 0xA9), (1, ord("y")), (0, ord("z"))]:
        piece = Piece(choice, "", told=[Told(token_id, TokenLogprobs(-1.0, []))])
        found += form.chunks(piece)[0]["choices"][0]["logprobs"]["text_offset"]
    assert found == [0, 0, 0, 1, 1]

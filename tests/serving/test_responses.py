"""OpenAI's objects: where in the text each token stands."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from mola.generation.batching.rows import TokenLogprobs
from mola.serving.responses import CompletionFormat
from mola.serving.stream_writer import AnswerPiece


class ByteDecoder:
    """Decodes tokens that are one byte each."""

    def token_text(self, token_id, is_first):
        text = self.decode_inside([token_id])
        return (f"<{token_id:x}>", None) if "\ufffd" in text else (text, [token_id])

    def decode_inside(self, token_ids):
        return bytes(token_ids).decode("utf-8", "replace")


@pytest.mark.parametrize("size", [1, 2, 100], ids=["every token alone", "in pairs", "as a whole"])
def test_offsets_count_characters_whatever_tokens_they_are_made_of(size):
    # The last but one is no character.
    ids = [*"aé😀b".encode(), 0x80, ord("c")]
    form = CompletionFormat("model", ByteDecoder())
    logprobs = [TokenLogprobs(token_id, -1.0, []) for token_id in ids]
    pieces = [AnswerPiece(0, "", logprobs=logprobs[start : start + size]) for start in range(0, len(logprobs), size)]
    offsets = [each for piece in pieces for each in form.chunks(piece)[0]["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 1, 2, 2, 2, 2, 3, 4, 5]


def test_choices_have_offsets_of_their_own():
    form = CompletionFormat("model", ByteDecoder())
    found = []
    for choice, token_id in [(0, 0xC3), (1, ord("x")), (0, 0xA9), (1, ord("y")), (0, ord("z"))]:
        piece = AnswerPiece(choice, "", logprobs=[TokenLogprobs(token_id, -1.0, [])])
        found += form.chunks(piece)[0]["choices"][0]["logprobs"]["text_offset"]
    assert found == [0, 0, 0, 1, 1]

"""Pieces of text: put together they are the whole, and no piece has to be taken back."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AddedToken, PreTrainedTokenizerFast

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from mola.serving.stream_writer import StreamWriter, TokenDecoder

from ..conftest import build_byte_tokenizer

BYTES = build_byte_tokenizer()
ALPHABET = "aé€😀 "


def fallback_tokenizer():
    """Two letters as tokens, everything else as bytes, as SentencePiece models have it."""
    tokens = ["<unk>", "</s>", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


FALLBACK = fallback_tokenizer()


def word_tokenizer():
    """Whole words, between which decoding writes a space."""
    words = ["<unk>", "</s>", "we", "go", "home", "##s", ",", ""]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


WORDS = word_tokenizer()


def write(tokenizer, token_ids, stops=(), streams=True):
    """Pieces, whole text, reason, tokens used."""
    pieces = []
    writer = StreamWriter(TokenDecoder(tokenizer, [tokenizer.eos_token_id]), pieces.append if streams else None, stops)
    for token_id in token_ids:
        if not writer.add(token_id):
            break
    reason = writer.finish()
    return pieces, writer.text, reason, len(writer.token_ids)


def cut(text, stops):
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


@given(st.lists(st.integers(2, 257), min_size=1, max_size=30))
def test_any_bytes_are_sent_as_decoded_at_once(token_ids):
    pieces, text, reason, used = write(BYTES, token_ids)
    assert "".join(pieces) == text == BYTES.decode(token_ids, skip_special_tokens=True)
    assert (reason, used) == ("length", len(token_ids))


@given(st.lists(st.integers(0, 259), min_size=1, max_size=30))
@example([4 + ord("A"), 1, 4 + 0xFF])  # bytes on both sides of a special token are decoded together
def test_byte_fallback_is_sent_as_decoded_at_once(token_ids):
    pieces, text, _, _ = write(FALLBACK, token_ids)
    assert "".join(pieces) == text == FALLBACK.decode(token_ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=30))
def test_words_are_sent_as_decoded_at_once(token_ids):
    pieces, text, _, _ = write(WORDS, token_ids)
    assert "".join(pieces) == text == WORDS.decode(token_ids, skip_special_tokens=True)


def test_a_token_costs_no_decoding_of_the_answer_before_it():
    class Counting(TokenDecoder):
        num_tokens = 0

        def decode_answer(self, token_ids):
            self.num_tokens += len(token_ids)
            return super().decode_answer(token_ids)

    decoder = Counting(BYTES, [BYTES.eos_token_id])
    writer = StreamWriter(decoder, lambda piece: None, ["STOP"])
    for token_id in BYTES("a word " * 100, add_special_tokens=False)["input_ids"]:
        writer.add(token_id)
    assert writer.finish() == "length"
    assert decoder.num_tokens <= 5 * len(writer.token_ids)


@given(st.text(ALPHABET, min_size=1, max_size=20), st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
def test_stops_cut_the_same_in_streams_and_wholes(text, stops):
    token_ids = BYTES(text, add_special_tokens=False)["input_ids"]
    pieces, streamed, reason, used = write(BYTES, token_ids, stops)
    assert "".join(pieces) == streamed
    assert write(BYTES, token_ids, stops, streams=False) == ([], streamed, reason, used)
    found = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert (reason == "stop") == bool(found)
    if found:  # it ends with the first stop that is complete
        assert used == len(text[: min(found)].encode())
        assert streamed == cut(text[: min(found)], stops)
    else:
        assert streamed == text


def test_a_stop_of_byte_tokens_is_seen_at_once():
    line_break = 4 + ord("\n")
    pieces, text, reason, used = write(FALLBACK, [2, line_break, line_break, 3], ["\n"])
    assert ("".join(pieces), text, reason, used) == ("a", "a", "stop", 2)


def test_text_is_sent_as_soon_as_it_is_final():
    token_ids = BYTES("é STOP", add_special_tokens=False)["input_ids"]
    assert write(BYTES, token_ids)[0] == ["é", " ", "S", "T", "O", "P"]
    assert write(BYTES, token_ids, ["STAY"])[0] == ["é", " ", "STO", "P"]
    assert write(BYTES, token_ids, ["TOP"])[0] == ["é", " ", "S"]


def test_end_token_and_special_stops_end_without_text():
    token_ids = [*BYTES("ab", add_special_tokens=False)["input_ids"], BYTES.eos_token_id]
    assert write(BYTES, token_ids) == (["a", "b"], "ab", "stop", 3)
    begin = [token_ids[0], BYTES.bos_token_id, token_ids[1]]
    assert write(BYTES, begin, ["<s>"]) == (["a"], "a", "stop", 2)
    assert write(BYTES, begin, ["<s>"], streams=False) == ([], "a", "stop", 2)


def test_tokenizers_that_take_back_spaces_send_at_the_end():
    tokenizer = build_byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    token_ids = tokenizer("a . b", add_special_tokens=False)["input_ids"]
    assert write(tokenizer, token_ids)[0] == ["a. b"]
    assert write(tokenizer, token_ids, [". "]) == (["a"], "a", "stop", 4)


def test_stops_may_be_tokens_that_are_only_marked_as_special():
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<sep>", special=True)])
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    separator = tokenizer.convert_tokens_to_ids("<sep>")
    assert "<sep>" not in tokenizer.all_special_tokens
    assert write(tokenizer, [a, separator, b], ["<sep>"]) == (["a"], "a", "stop", 2)

"""From the tokens of one answer to pieces of text that are final when they are sent.

The pieces put together are the text that decoding all tokens at once gives, up to the first stop text. So a piece
leaves out what later tokens could still change: half a character, or the beginning of a stop text.
"""

import re
from collections.abc import Callable, Collection, Sequence

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_INCOMPLETE = "\ufffd"


class Decoder:
    """A tokenizer, and what all answers have to know of it.

    Args:
        tokenizer: of the model.
        end_token_ids: tokens that end an answer by themselves.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids
        self.special = special_tokens(tokenizer)
        self.takes_back_spaces = _takes_back_spaces(tokenizer)

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is a byte of a character that the vocabulary does not have."""
        return _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token_id))) is not None


class Writer:
    """Takes the tokens of one answer.

    Args:
        decoder: of the model's tokenizer.
        send: takes every piece of text; None for an answer that is sent as a whole.
        stops: texts that end the answer and do not belong to it.
    """

    def __init__(self, decoder: Decoder, send: Callable[[str], None] | None, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._send = send
        special = decoder.special
        self._stop_ids = {special[text] for text in stops if text in special}
        self._stops = [text for text in stops if text not in special]
        self._sent = 0
        self._stopped = False
        self.token_ids: list[int] = []
        self.text = ""

    def take(self, token_id: int) -> bool:
        """Take the next token; False when a stop text is complete."""
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            self._stopped = True
        elif self._send is not None or self._stops:
            self._write(self._unchangeable(), is_final=False)
            is_late = self._decoder.takes_back_spaces or self._decoder.is_byte(token_id)
            if is_late and self._stops:
                text = self._decoded()
                self._stopped = self._stopped or any(stop in text for stop in self._stops)
        return not self._stopped

    def finish(self) -> str:
        """Send what is left; OpenAI's reason for the end, `"stop"` or `"length"`."""
        ids = self.token_ids
        self._write(self._decoded(), is_final=True)
        return "stop" if self._stopped or (ids and ids[-1] in self._decoder.end_token_ids) else "length"

    def _unchangeable(self) -> str:
        if self._decoder.takes_back_spaces:
            return ""
        if self._decoder.is_byte(self.token_ids[-1]):
            return self.text  # a run of byte tokens is decoded as one
        return self._decoded().rstrip(_INCOMPLETE)

    def _decoded(self) -> str:
        return self._decoder.decode(self.token_ids)

    def _write(self, text: str, is_final: bool) -> None:
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self._stopped = True
            text = text[: min(places)]
        elif not is_final:
            text = text[: len(text) - _longest_beginning(text, self._stops)]
        if is_final or places or len(text) > self._sent:
            if not text.startswith(self.text[: self._sent]):
                raise RuntimeError("the tokenizer changed text that had been sent")
            self.text = text
            if self._send is not None and len(text) > self._sent:
                self._send(text[self._sent :])
            self._sent = len(text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every token that answers never show, named as one of the tokenizer's own or only marked as special."""
    marked = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**marked, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def _takes_back_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding drops spaces before later characters; many tokenizers say so and do not."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    ids = tokenizer("a . b", add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that one of `stops` begins with."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    return next((size for size in range(min(longest, len(text)), 0, -1) if text.endswith(_cut(stops, size))), 0)


def _cut(stops: Sequence[str], size: int) -> tuple[str, ...]:
    return tuple(stop[:size] for stop in stops if len(stop) > size)

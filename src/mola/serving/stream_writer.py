"""From the tokens of one answer to pieces of text that are final when they are sent.

All pieces together are the text that decoding all tokens at once gives, up to the first stop text. So a piece leaves
out the text that later tokens could still change: an incomplete character, or the beginning of a stop text.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from mola.generation.batching.rows import TokenLogprobs

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\ufffd"  # the character that decoding writes for bytes that form no complete character
_CACHED_TOKENS = 1 << 16


@dataclass(frozen=True)
class AnswerPiece:
    """New text of one answer. The last piece has the finish reason and the number of tokens."""

    choice: int  # number of the answer within its request
    text: str
    finish_reason: str | None = None  # "stop" or "length"
    num_tokens: int = 0
    logprobs: Sequence[TokenLogprobs] = ()  # for the tokens since the previous piece, if the request asked for them


class TokenDecoder:
    """Turns tokens into text; shared by all answers.

    Args:
        tokenizer: the model's tokenizer.
        end_token_ids: ids of the tokens that end an answer, whatever the adapter.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.end_token_ids = end_token_ids
        self.special_tokens = special_tokens(tokenizer)
        self._special_ids = frozenset(self.special_tokens.values())
        self.removes_spaces = _removes_spaces(tokenizer)
        # Some tokenizers drop the space before the first token, so later tokens are decoded after this token.
        self._first = list(tokenizer("a", add_special_tokens=False)["input_ids"][-1:])
        self._first_text = str(tokenizer.decode(self._first))
        self.token_text = lru_cache(_CACHED_TOKENS)(self._token_text)

    def decode_answer(self, token_ids: list[int]) -> str:
        """Text of all tokens of an answer so far, without special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def decode_inside(self, token_ids: Sequence[int]) -> str:
        """Text of tokens that follow other tokens."""
        return str(self._tokenizer.decode([*self._first, *token_ids])).removeprefix(self._first_text)

    def _token_text(self, token_id: int, is_first: bool) -> tuple[str, list[int] | None]:
        """Text and bytes of one token. If it is only part of a character: the tokenizer's name for the token, and None.

        `is_first` says whether the token is the first one of its answer.
        """
        text = str(self._tokenizer.decode([token_id])) if is_first else self.decode_inside([token_id])
        if _REPLACEMENT in text:
            return str(self._tokenizer.convert_ids_to_tokens(token_id)), None
        return text, list(text.encode())

    def is_joined(self, token_id: int) -> bool:
        """Whether later tokens are decoded together with a token: one byte of a character, or a special token."""
        name = str(self._tokenizer.convert_ids_to_tokens(token_id))
        return token_id in self._special_ids or _BYTE_TOKEN.fullmatch(name) is not None


@dataclass(frozen=True)
class _Window:
    """The tokens that the next text is decoded from. Without one, each token would cost a decoding of all before it."""

    text: str = ""  # of all tokens before `end`
    context: str = ""  # text of the tokens from `start` to `end`, decoded alone
    start: int = 0
    end: int = 0


class StreamWriter:
    """Collects the tokens of one answer and sends its text as soon as the text is final.

    Args:
        decoder: decodes with the model's tokenizer.
        send: receives every piece of text; None for an answer that is sent as a whole.
        stops: texts that end the answer. They are not part of it.
    """

    def __init__(self, decoder: TokenDecoder, send: Callable[[str], None] | None, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._send = send
        special = decoder.special_tokens
        self._stop_ids = {special[text] for text in stops if text in special}
        self._stops = [text for text in stops if text not in special]
        self._num_sent = 0
        self._is_stopped = False
        self._window = _Window()
        self.token_ids: list[int] = []
        self.text = ""

    def add(self, token_id: int) -> bool:
        """Add the next token; return whether the answer continues, which is False after a complete stop text."""
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            self._is_stopped = True
        elif self._send is not None or self._stops:
            self._write(self._final_text(), is_last=False)
            if self._stops and (self._decoder.removes_spaces or self._decoder.is_joined(token_id)):
                text = self._decoded()
                self._is_stopped = self._is_stopped or any(stop in text for stop in self._stops)
        return not self._is_stopped

    def finish(self) -> str:
        """Send the rest of the text; return OpenAI's finish reason, "stop" or "length"."""
        self._write(self._decoder.decode_answer(self.token_ids), is_last=True)
        is_ended = bool(self.token_ids) and self.token_ids[-1] in self._decoder.end_token_ids
        return "stop" if self._is_stopped or is_ended else "length"

    def _final_text(self) -> str:
        """The text that later tokens cannot change."""
        if self._decoder.removes_spaces:
            return ""
        if self._decoder.is_joined(self.token_ids[-1]):
            return self.text
        text = self._decoded()
        if not text.endswith(_REPLACEMENT):
            self._move_window(text)
        return text.rstrip(_REPLACEMENT)

    def _decoded(self) -> str:
        """Text of all tokens so far. Only those of the window are decoded, unless later tokens changed its context."""
        window = self._decoder.decode_answer(self.token_ids[self._window.start :])
        if not window.startswith(self._window.context):
            return self._decoder.decode_answer(self.token_ids)
        return self._window.text + window.removeprefix(self._window.context)

    def _move_window(self, text: str) -> None:
        """Later tokens are decoded after those that were new in `text`, the text of all tokens so far."""
        start, end = self._window.end, len(self.token_ids)
        context = self._decoder.decode_answer(self.token_ids[start:])
        if context and text.endswith(context):
            self._window = _Window(text, context, start, end)

    def _write(self, text: str, is_last: bool) -> None:
        """Send what is new in `text`, up to the first stop text."""
        starts = [start for start in (text.find(stop) for stop in self._stops) if start >= 0]
        if starts:
            self._is_stopped = True
            text = text[: min(starts)]
        elif not is_last:
            text = text[: len(text) - _length_of_started_stop(text, self._stops)]
        if not (is_last or starts or len(text) > self._num_sent):
            return
        if not text.startswith(self.text[: self._num_sent]):
            raise RuntimeError("the tokenizer changed text that was sent already")
        self.text = text
        if self._send is not None and len(text) > self._num_sent:
            self._send(text[self._num_sent :])
        self._num_sent = len(text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text and id of every token that answers leave out."""
    marked = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**marked, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def _removes_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding removes spaces before some characters. Many tokenizers have this setting without its effect."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    ids = tokenizer("a . b", add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _length_of_started_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop text."""
    longest = min(len(text), max((len(stop) - 1 for stop in stops), default=0))
    for size in range(longest, 0, -1):
        if text.endswith(tuple(stop[:size] for stop in stops if len(stop) > size)):
            return size
    return 0

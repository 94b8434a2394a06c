"""OpenAI's response objects, for whole answers and for the chunks of a stream."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from mola.serving.stream_writer import AnswerPiece, TokenDecoder

_REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no complete character


class ChatFormat:
    """Objects of `/v1/chat/completions` for one request."""

    def __init__(self, model: str, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._started_choices: set[int] = set()  # choices of which a log-probability was sent
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks before the first text, which name the role."""
        return [self._chunk(choice, {"role": "assistant", "content": ""}, None) for choice in range(num_choices)]

    def chunks(self, piece: AnswerPiece) -> list[dict[str, Any]]:
        """Chunks of one piece."""
        chunks = []
        if piece.text or piece.logprobs:
            chunks.append(self._chunk(piece.choice, {"content": piece.text}, None, self._logprobs(piece)))
        if piece.finish_reason is not None:
            chunks.append(self._chunk(piece.choice, {}, piece.finish_reason))
        return chunks

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, for requests with `include_usage`."""
        return self._common | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, pieces: Sequence[AnswerPiece], usage: dict[str, int]) -> dict[str, Any]:
        """The object of a request that does not stream: one piece per choice."""
        choices = [
            {
                "index": piece.choice,
                "message": {"role": "assistant", "content": piece.text},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
            }
            for piece in pieces
        ]
        return self._common | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _chunk(
        self, choice: int, delta: dict[str, str], finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choices = [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        return self._common | {"object": "chat.completion.chunk", "choices": choices}

    def _logprobs(self, piece: AnswerPiece) -> dict[str, Any] | None:
        if not piece.logprobs:
            return None
        content = []
        for token in piece.logprobs:
            is_first = piece.choice not in self._started_choices
            self._started_choices.add(piece.choice)
            top = [self._token(token_id, value, is_first) for token_id, value in token.top]
            content.append(self._token(token.token_id, token.own, is_first) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float, is_first: bool) -> dict[str, Any]:
        text, data = self._decoder.token_text(token_id, is_first)
        return {"token": text, "logprob": logprob, "bytes": data}


class CompletionFormat:
    """Objects of `/v1/completions` for one request. Chunks have the form of whole answers."""

    def __init__(self, model: str, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._num_characters: dict[int, int] = {}  # by choice: characters of the tokens that were sent
        self._incomplete: dict[int, list[int]] = {}  # by choice: tokens of a character that is not complete
        self._common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """A stream of completions begins with its text."""
        return []

    def chunks(self, piece: AnswerPiece) -> list[dict[str, Any]]:
        """Chunks of one piece."""
        return [self._common | {"choices": [self._choice(piece)]}]

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, for requests with `include_usage`."""
        return self._common | {"choices": [], "usage": usage}

    def whole(self, pieces: Sequence[AnswerPiece], usage: dict[str, int]) -> dict[str, Any]:
        """The object of a request that does not stream: one piece per choice."""
        return self._common | {"choices": [self._choice(piece) for piece in pieces], "usage": usage}

    def _choice(self, piece: AnswerPiece) -> dict[str, Any]:
        logprobs = self._logprobs(piece) if piece.logprobs else None
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, piece: AnswerPiece) -> dict[str, Any]:
        texts, tops, offsets = [], [], []
        for token in piece.logprobs:
            is_first = piece.choice not in self._num_characters
            text, data = self._decoder.token_text(token.token_id, is_first)
            texts.append(text)
            offsets.append(self._offset(piece.choice, token.token_id, None if data is None else text))
            top: dict[str, float] = {}
            for token_id, value in token.top:  # most probable first: it keeps a text that two tokens share
                top.setdefault(self._decoder.token_text(token_id, is_first)[0], value)
            tops.append(top)
        own = [token.own for token in piece.logprobs]
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}

    def _offset(self, choice: int, token_id: int, text: str | None) -> int:
        """Where a token begins in the text of its answer, in characters.

        `text` is the token's own text, or None for a token that is a part of a character.
        """
        incomplete = self._incomplete.setdefault(choice, [])
        start = self._num_characters.get(choice, 0)
        if text is not None:
            # The incomplete tokens before it have become replacement characters.
            start += len(self._decoder.decode_inside(incomplete)) if incomplete else 0
            incomplete.clear()
            self._num_characters[choice] = start + len(text)
            return start
        incomplete.append(token_id)
        decoded = self._decoder.decode_inside(incomplete)
        if _REPLACEMENT in decoded:
            self._num_characters[choice] = start
        else:
            self._num_characters[choice] = start + len(decoded)
            incomplete.clear()
        return start


def count_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts under OpenAI's names."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }

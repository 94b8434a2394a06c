"""What clients get: OpenAI's objects for whole answers and for streams."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from mola.serving.tickets import Piece

Spell = Callable[[int, bool], tuple[str, list[int] | None]]  # see `JobMaker.spell`
Decode = Callable[[Sequence[int]], str]  # see `JobMaker.decode`
_BROKEN = "\ufffd"  # of bytes that make no character


class ChatForm:
    """Objects of `/v1/chat/completions`."""

    def __init__(self, model: str, spell: Spell) -> None:
        self._spell = spell
        self._begun: set[int] = set()  # choices of which a token was told
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks before the first text: who speaks."""
        return [self._chunk(choice, {"role": "assistant", "content": ""}, None) for choice in range(num_choices)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Chunks for one piece."""
        chunks = []
        if piece.text or piece.told:
            chunks.append(self._chunk(piece.choice, {"content": piece.text}, None, self._logprobs(piece)))
        return chunks if piece.reason is None else [*chunks, self._chunk(piece.choice, {}, piece.reason)]

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last one, if the client asked for it."""
        return self._common | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one object."""
        choices = [
            {
                "index": piece.choice,
                "message": {"role": "assistant", "content": piece.text},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.reason,
            }
            for piece in pieces
        ]
        return self._common | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _chunk(
        self, choice: int, delta: dict[str, str], reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choices = [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]
        return self._common | {"object": "chat.completion.chunk", "choices": choices}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.told:
            return None
        content = []
        for each in piece.told:
            is_first = piece.choice not in self._begun
            self._begun.add(piece.choice)
            top = [self._token(*pair, is_first) for pair in each.logprobs.top]
            content.append(self._token(each.token_id, each.logprobs.own, is_first) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float, is_first: bool) -> dict[str, Any]:
        text, data = self._spell(token_id, is_first)
        return {"token": text, "logprob": logprob, "bytes": data}


class CompletionForm:
    """Objects of `/v1/completions`; chunks look like whole answers."""

    def __init__(self, model: str, spell: Spell, decode: Decode) -> None:
        self._spell, self._decode = spell, decode
        self._written: dict[int, int] = {}  # characters of each choice whose tokens were told
        self._parts: dict[int, list[int]] = {}  # of each choice the tokens of a character that is not complete
        self._common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Nothing comes before the text."""
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Chunks for one piece."""
        return [self._common | {"choices": [self._choice(piece)]}]

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last one, if the client asked for it."""
        return self._common | {"choices": [], "usage": usage}

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one object."""
        return self._common | {"choices": [self._choice(piece) for piece in pieces], "usage": usage}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece) if piece.told else None
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.reason}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        texts, tops, offsets = [], [], []
        for each in piece.told:
            is_first = piece.choice not in self._written
            text, data = self._spell(each.token_id, is_first)
            texts.append(text)
            offsets.append(self._offset(piece.choice, each.token_id, None if data is None else text))
            top: dict[str, float] = {}
            for token_id, value in each.logprobs.top:  # from the most probable, which keeps a text that two have
                top.setdefault(self._spell(token_id, is_first)[0], value)
            tops.append(top)
        own = [each.logprobs.own for each in piece.told]
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}

    def _offset(self, choice: int, token_id: int, text: str | None) -> int:
        """Where a token begins in the text; `text` is its own, None for a part of a character."""
        parts, start = self._parts.setdefault(choice, []), self._written.get(choice, 0)
        if text is not None:
            start += len(self._decode(parts)) if parts else 0  # which were no character
            parts.clear()
            self._written[choice] = start + len(text)
            return start
        parts.append(token_id)
        written = self._decode(parts)
        is_complete = _BROKEN not in written
        self._written[choice] = start + is_complete * len(written)
        if is_complete:
            parts.clear()
        return start


def count_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts as OpenAI names them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }

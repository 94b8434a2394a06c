"""What clients get: OpenAI's objects for whole answers and for streams."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from mola.serving.queue import Piece


class ChatForm:
    """Objects of `/v1/chat/completions`."""

    def __init__(self, model: str) -> None:
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks before the first text: who speaks."""
        return [self._chunk(choice, {"role": "assistant", "content": ""}, None) for choice in range(num_choices)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Chunks for one piece."""
        chunks = [self._chunk(piece.choice, {"content": piece.text}, None)] if piece.text else []
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
                "logprobs": None,
                "finish_reason": piece.reason,
            }
            for piece in pieces
        ]
        return self._common | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _chunk(self, choice: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        choices = [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}]
        return self._common | {"object": "chat.completion.chunk", "choices": choices}


class CompletionForm:
    """Objects of `/v1/completions`; chunks look like whole answers."""

    def __init__(self, model: str) -> None:
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
        return [self._common | {"choices": [_text_choice(piece)]}]

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last one, if the client asked for it."""
        return self._common | {"choices": [], "usage": usage}

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one object."""
        return self._common | {"choices": [_text_choice(piece) for piece in pieces], "usage": usage}


def _text_choice(piece: Piece) -> dict[str, Any]:
    return {"index": piece.choice, "text": piece.text, "logprobs": None, "finish_reason": piece.reason}


def count_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts as OpenAI names them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }

"""What clients receive: OpenAI's response objects for whole answers and for the chunks of a stream, and errors."""

import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mola.checkpoints.skills_folder import BASE
from mola.errors import MolaError
from mola.files.failures import memory_error_reason
from mola.serving.stream_writer import AnswerPiece, TokenDecoder

logger = logging.getLogger(__name__)

_REPLACEMENT = "\ufffd"  # the character that decoding writes for bytes that form no complete character
_MAX_NAMES = 50  # a message lists at most this many names of models
_MAX_FIELD_NAME = 80  # a message repeats at most this many characters of a client's field name


class _AnswerFormat:
    """OpenAI's objects for the answers to one request."""

    _id_prefix: ClassVar[str]
    _object: ClassVar[str]
    _chunk_object: ClassVar[str]

    def __init__(self, model: str, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._common = {"id": f"{self._id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[AnswerPiece], usage: dict[str, Any]) -> dict[str, Any]:
        """The object of a request that does not stream: one piece per choice."""
        choices = [self._choice(piece) for piece in pieces]
        return self._common | {"object": self._object, "choices": choices, "usage": usage}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream, for requests with `include_usage`."""
        return self._common | {"object": self._chunk_object, "choices": [], "usage": usage}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._common | {"object": self._chunk_object, "choices": [choice]}

    def _choice(self, piece: AnswerPiece) -> dict[str, Any]:
        raise NotImplementedError


class ChatFormat(_AnswerFormat):
    """Objects of `/v1/chat/completions` for one request."""

    _id_prefix, _object, _chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, decoder: TokenDecoder) -> None:
        super().__init__(model, decoder)
        self._started_choices: set[int] = set()  # choices with a log-probability that was sent

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """Chunks before the first text, which name the role."""
        return [self._delta(choice, {"role": "assistant", "content": ""}) for choice in range(num_choices)]

    def chunks(self, piece: AnswerPiece) -> list[dict[str, Any]]:
        """Chunks of one piece."""
        chunks = []
        if piece.text or piece.logprobs:
            chunks.append(self._delta(piece.choice, {"content": piece.text}, logprobs=self._logprobs(piece)))
        if piece.finish_reason is not None:
            chunks.append(self._delta(piece.choice, {}, piece.finish_reason))
        return chunks

    def _delta(
        self, choice: int, delta: dict[str, str], finish_reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return self._chunk({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason})

    def _choice(self, piece: AnswerPiece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text}
        logprobs = self._logprobs(piece)
        return {"index": piece.choice, "message": message, "logprobs": logprobs, "finish_reason": piece.finish_reason}

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


class CompletionFormat(_AnswerFormat):
    """Objects of `/v1/completions` for one request. Chunks have the form of whole answers."""

    _id_prefix, _object, _chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, decoder: TokenDecoder) -> None:
        super().__init__(model, decoder)
        self._num_characters: dict[int, int] = {}  # by choice: number of characters of the tokens that were sent
        self._incomplete: dict[int, list[int]] = {}  # by choice: tokens of the last character, if it is not complete

    def first_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """No chunks: a stream of completions begins with its text."""
        return []

    def chunks(self, piece: AnswerPiece) -> list[dict[str, Any]]:
        """Chunks of one piece."""
        return [self._chunk(self._choice(piece))]

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
            for token_id, value in token.top:  # of two tokens with the same text, the more probable one is kept
                top.setdefault(self._decoder.token_text(token_id, is_first)[0], value)
            tops.append(top)
        own = [token.own for token in piece.logprobs]
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}

    def _offset(self, choice: int, token_id: int, text: str | None) -> int:
        """The position at which a token begins in the text of its answer, in characters.

        `text` is the token's own text, or None if the token is only part of a character.
        """
        incomplete = self._incomplete.setdefault(choice, [])
        start = self._num_characters.get(choice, 0)
        if text is not None:
            # The incomplete tokens before this token have become replacement characters.
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


def usage_counts(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of a request, under OpenAI's names."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def skill_headers(skills: Iterable[str | None]) -> dict[str, str]:
    """A response header that names the skills that give the answers; None is the base model."""
    return {"X-Mola-Skill": ", ".join(dict.fromkeys(skill or BASE for skill in skills))}


def skill_usage(skills: Sequence[str | None]) -> dict[str, Any]:
    """The same as a field of `usage`: null for the base model, and a list by answer if the skills differ."""
    return {"skill": skills[0] if len(set(skills)) == 1 else list(skills)}


class RequestError(HTTPException):
    """A request that the server refuses, or an answer that ends early.

    Args:
        status: HTTP status.
        message: what is wrong and how to correct it.
        code: OpenAI's machine-readable code; None for errors without a code.
        param: name of the wrong field.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The error as a JSON object, in the form of OpenAI's servers."""
        types = {401: "authentication_error", 429: "rate_limit_error"}
        kind = types.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        # Half surrogate pairs, which JSON allows but UTF-8 does not, are escaped.
        return {"error": {k: v and v.encode("utf-8", "backslashreplace").decode() for k, v in error.items()}}

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def unknown_model(name: str, known: Iterable[str]) -> RequestError:
    """The error for a request that names a model that does not exist."""
    names = list(known)
    more = f" and {len(names) - _MAX_NAMES} more, which /v1/models lists" if len(names) > _MAX_NAMES else ""
    return RequestError(
        404,
        f"`model` {name[:200]!r} does not exist here. The models are {', '.join(names[:_MAX_NAMES])}{more}.",
        code="model_not_found",
        param="model",
    )


def add_error_handlers(app: FastAPI) -> None:
    """Make an application answer every exception in OpenAI's form."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return to_request_error(error).response()

    for kind in (HTTPException, MolaError, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def to_request_error(error: Exception) -> RequestError:
    """The error that a client receives for an exception.

    Messages name wrong fields. They never repeat the values that pydantic refused, because those may be private text.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _from_validation(error)
    if isinstance(error, MolaError):
        return RequestError(400, str(error))
    if (reason := memory_error_reason(error)) is not None:
        logger.warning("Out of memory: %s.", reason)
        return RequestError(503, "the server does not have enough memory for this request. Shorten it.")
    # After an unknown exception uvicorn closes the connection, so the response announces it.
    return RequestError(
        500, "the server failed to answer this request; its log says why.", headers={"Connection": "close"}
    )


def _from_validation(error: RequestValidationError) -> RequestError:
    """The error that describes the first mistake that pydantic found in a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return RequestError(400, "the body is not valid JSON.")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MolaError):
        return RequestError(400, str(cause))
    field = ".".join(str(part) for part in first["loc"][1:])[:_MAX_FIELD_NAME]
    if not field:
        return RequestError(400, "the body must be a JSON object, sent with `Content-Type: application/json`.")
    if first["type"] == "extra_forbidden":
        return RequestError(400, f"`{field}` is not supported by this server. Leave it out.", param=field)
    return RequestError(400, f"`{field}` is wrong: {first['msg']}.", param=field)

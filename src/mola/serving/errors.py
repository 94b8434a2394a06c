"""Errors that a client receives: OpenAI's JSON form with an HTTP status."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mola.errors import MolaError
from mola.files.failures import memory_error_reason

logger = logging.getLogger(__name__)

_MAX_FIELD_NAME = 80  # characters of a client's field name that a message repeats


class RequestError(HTTPException):
    """A request that the server refuses, or an answer that ends early.

    Args:
        status: HTTP status.
        message: what is wrong and how to correct it.
        code: OpenAI's machine-readable code, for errors that have one.
        param: the wrong field.
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
        """The error as OpenAI's servers write it."""
        return {
            "error": {
                "message": _as_utf8(self.detail),
                "type": self._type(),
                "param": self.param and _as_utf8(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body(), self.status_code, self.headers)

    def _type(self) -> str:
        if self.status_code >= 500:
            return "server_error"
        types = {401: "authentication_error", 429: "rate_limit_error"}
        return types.get(self.status_code, "invalid_request_error")


def _as_utf8(text: str) -> str:
    """Escape half surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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
    if (lack := memory_error_reason(error)) is not None:
        logger.warning("Out of memory: %s.", lack)
        return RequestError(503, "the server does not have enough memory for this request. Shorten it.")
    # After an unknown exception uvicorn closes the connection, so the response announces it.
    return RequestError(
        500, "the server failed to answer this request; its log says why.", headers={"Connection": "close"}
    )


def _from_validation(error: RequestValidationError) -> RequestError:
    """Describe the first fault that pydantic found in a body."""
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

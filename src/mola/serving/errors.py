"""Errors a client sees: OpenAI's JSON form, with the HTTP status that fits."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mola.errors import MolaError

_LONGEST_ECHO = 80  # characters of a wrong value that a message repeats
_TEXT_OF_PEOPLE = ("prompt", "messages")  # fields that no message repeats
_NO_OBJECT = ("model_attributes_type", "model_type", "dict_type")


class RequestError(HTTPException):
    """A request that is refused, or an answer that ends early.

    Args:
        status: HTTP status.
        message: what is wrong, the value, the limit and the cure.
        code: OpenAI's machine-readable code, where it has one.
        param: the field that is wrong.
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
                "message": _encodable(self.detail),
                "type": _kind(self.status_code),
                "param": self.param and _encodable(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def _encodable(text: str) -> str:
    """JSON can hold half a surrogate pair, UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _kind(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")


def add_handlers(app: FastAPI) -> None:
    """Let every error of an application leave it in this form."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return _as_request_error(error).response()

    for kind in (HTTPException, MolaError, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return from_validation(error)
    return RequestError(400, str(error)) if isinstance(error, MolaError) else internal()


def internal() -> RequestError:
    """What a client is told about a bug; the server's log has the traceback."""
    # Starlette raises the error once more, upon which the connection is cut: the client has to know.
    text = "the server failed to answer this request; its log says why."
    return RequestError(500, text, headers={"Connection": "close"})


def from_validation(error: RequestValidationError) -> RequestError:
    """The first thing that pydantic found wrong with a body."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
    if not place and first["type"] == "missing":
        return RequestError(400, "the body is empty: send a JSON object.")
    if not place and first["type"] in _NO_OBJECT:
        return RequestError(400, "the body must be a JSON object, sent with `Content-Type: application/json`.")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MolaError):
        return RequestError(400, str(cause))
    name = _shortened(".".join(place))
    if first["type"] == "missing":
        return RequestError(400, f"`{name}` is missing.", param=name)
    if first["type"] == "extra_forbidden":
        return RequestError(400, f"`{name}` is no field that this server knows. Leave it out.", param=name)
    is_private = place[:1] and place[0] in _TEXT_OF_PEOPLE and first["type"] != "literal_error"
    value = f"a value of type {_json_type(first['input'])}" if is_private else _shortened(repr(first["input"]))
    return RequestError(400, f"`{name}` is wrong: {first['msg']}; got {value}.", param=name)


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}..."

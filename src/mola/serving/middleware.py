"""ASGI middleware: checks the token and the size of a request before the application reads it, and logs the request."""

import logging
import secrets
import time
from collections.abc import Callable
from urllib.parse import quote

from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mola.serving.errors import RequestError

logger = logging.getLogger(__name__)

_PATH_WITHOUT_TOKEN = "/health"
_MAX_LOGGED_PATH = 200  # characters


class RequestMiddleware:
    """Answers 401 without the right token and 413 to a body that is too large; everything else reaches `app`.

    Args:
        app: the application.
        api_key: token that clients must send; None if they need none.
        max_body_bytes: size of the largest body.
        count_response: is called with the status of every response.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None, max_body_bytes: int, count_response: Callable[[int], None]
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._max_body_bytes = max_body_bytes
        self._count_response = count_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status = 500  # Starlette answers exceptions outside of this middleware

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        error = self._find_error(scope["path"], Headers(scope=scope))
        app = self._app if error is None else error.response()
        try:
            await app(scope, self._limit_body(receive), send_and_note_status)
        finally:
            self._count_response(status)
            # The query and the headers may hold a token, so the log has neither. A path may hold line breaks.
            path = quote(scope["path"][:_MAX_LOGGED_PATH])
            logger.info("%s %s %d %.2f s", scope["method"], path, status, time.monotonic() - start)

    def _find_error(self, path: str, headers: Headers) -> RequestError | None:
        if self._api_key is not None and path != _PATH_WITHOUT_TOKEN and not self._has_token(headers, self._api_key):
            return RequestError(
                401,
                "this server needs its token, and the request has none or a wrong one. Send the header "
                "`Authorization: Bearer TOKEN`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            return self._body_too_large()
        return None

    def _has_token(self, headers: Headers, api_key: str) -> bool:
        scheme, token = get_authorization_scheme_param(headers.get("authorization"))
        is_right = secrets.compare_digest(token.encode(), api_key.encode())  # in constant time
        return is_right and scheme.lower() == "bearer"

    def _limit_body(self, receive: Receive) -> Receive:
        """Wrap `receive` so that it raises when a body exceeds the limit.

        A chunked body declares no length, so the bytes are counted as they arrive.
        """
        size = 0

        async def receive_and_count() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise self._body_too_large()
            return message

        return receive_and_count

    def _body_too_large(self) -> RequestError:
        return RequestError(413, f"the body must have at most {self._max_body_bytes} bytes. Send less.")

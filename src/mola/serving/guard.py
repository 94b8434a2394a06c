"""What happens to a request before its body is read: token, size; and its line in the log."""

import hashlib
import hmac
import logging
import time
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mola.serving.errors import RequestError

logger = logging.getLogger(__name__)

_OPEN = "/health"  # the one path that needs no token
# A client that is still sending does not see an answer; up to this many limits are read and thrown away first.
_DRAINED = 16
_LONGEST_PATH = 200  # characters of a path in the log


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        api_key: token that clients must send; None for no check.
        max_body_bytes: longest body.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        # Digests have one length, so that comparing them says nothing about the token's.
        self._digest = None if api_key is None else _digest(api_key.encode())
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event; other kinds than HTTP pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._serve(scope, receive, note)
        finally:
            # No query and no header: either may hold a token. Quoted: a path may hold line breaks.
            path = quote(scope["path"][:_LONGEST_PATH])
            logger.info("%s %s %s %.2f s", scope["method"], path, status or "-", time.monotonic() - start)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if self._digest is not None and scope["path"] != _OPEN and not self._is_authorized(headers):
            error = RequestError(
                401,
                "this server needs its token: send the header `Authorization: Bearer TOKEN`; what came is missing or "
                "wrong.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            await _drain(receive, _DRAINED * self._max_body_bytes)
            await self._too_large().response()(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _is_authorized(self, headers: Headers) -> bool:
        assert self._digest is not None
        kind, _, token = headers.get("authorization", "").partition(" ")
        # Header bytes arrive as Latin-1 text.
        is_right = hmac.compare_digest(_digest(token.strip().encode("latin-1")), self._digest)
        return is_right and kind.lower() == "bearer"

    def _counted(self, receive: Receive) -> Receive:
        """A body without declared length is counted while it comes."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                if message.get("more_body", False):  # else the next message is the client's leaving
                    await _drain(receive, _DRAINED * self._max_body_bytes)
                # The one exception that FastAPI lets through while it reads a body.
                raise HTTPException(413, str(self._too_large()))
            return message

        return counted

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body must have at most {self._max_body_bytes} bytes: it has more. Send less.")


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


async def _drain(receive: Receive, limit: int) -> None:
    """Read the rest of a body, up to a limit."""
    size, is_more = 0, True
    while is_more and size <= limit:
        message = await receive()
        size += len(message.get("body", b""))
        is_more = message["type"] == "http.request" and message.get("more_body", False)

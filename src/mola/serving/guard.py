"""What happens to a request before its body is read: host, token, size; and its line in the log."""

import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mola.serving.errors import RequestError

logger = logging.getLogger(__name__)

_OPEN = "/health"  # the one path that needs no token
# A client that is still sending does not see an answer; up to this many limits are read and thrown away first.
_DRAINED = 16
_LONGEST_PATH = 200  # characters of a path in the log
_LONGEST_ECHO = 80  # characters of a host that a message repeats
GONE = 499  # in the log alone: the client left, or was cut off, before it was answered


@dataclass(frozen=True)
class Checks:
    """What a request has to pass."""

    api_key: str | None = field(repr=False)  # token that clients must send; None for no check
    max_body_bytes: int
    is_local: bool  # only programs of this machine are to be answered, and no token keeps others out


class Guard:
    """ASGI middleware that lets through to `app` what passes the checks; `count` hears every status."""

    def __init__(self, app: ASGIApp, checks: Checks, count: Callable[[int], None]) -> None:
        self._app = app
        self._count = count
        # Digests have one length, so that comparing them says nothing about the token's.
        self._digest = None if checks.api_key is None else _digest(checks.api_key.encode())
        self._max_body_bytes = checks.max_body_bytes
        self._is_local = checks.is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event; other kinds than HTTP pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, is_gone = time.monotonic(), 0, False

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def notice() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone = is_gone or (message["type"] == "http.disconnect" and not status)
            return message

        try:
            await self._serve(scope, notice, note)
        except Exception:  # answered outside of here
            status = status or 500
            raise
        finally:
            # No query and no header: either may hold a token. Quoted: a path may hold line breaks.
            path = quote(scope["path"][:_LONGEST_PATH])
            shown = GONE if is_gone else status or "-"
            self._count(GONE if is_gone else status)
            logger.info("%s %s %s %.2f s", scope["method"], path, shown, time.monotonic() - start)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        error = self._error(scope, headers)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            await _drain(receive, _DRAINED * self._max_body_bytes)
            await self._too_large().response()(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _error(self, scope: Scope, headers: Headers) -> RequestError | None:
        if "transfer-encoding" in headers and "content-length" in headers:
            # Proxies differ in which of them they believe, and so in where the next request begins.
            return RequestError(
                400,
                "`Transfer-Encoding` and `Content-Length` contradict each other. Send one of them.",
                headers={"Connection": "close"},
            )
        if self._is_local and not _is_of_this_machine(host := headers.get("host", "")):
            return RequestError(
                403,
                f"`Host` must be localhost or an IP address: got {host[:_LONGEST_ECHO]!r}. No other name is "
                "answered without a token, since web pages could use one to reach this server. Set MOLA_API_KEY.",
                code="unknown_host",
            )
        if self._digest is not None and scope["path"] != _OPEN and not self._is_authorized(headers):
            return RequestError(
                401,
                "this server needs its token: send the header `Authorization: Bearer TOKEN`; what came is missing or "
                "wrong.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _is_authorized(self, headers: Headers) -> bool:
        assert self._digest is not None
        # Several headers are one wrong one, else it would be a matter of taste which of them counts.
        kind, _, token = ", ".join(headers.getlist("authorization")).partition(" ")
        # Header bytes arrive as Latin-1 text, where `strip` alone would take away more than blanks.
        is_right = hmac.compare_digest(_digest(token.strip(" \t").encode("latin-1")), self._digest)
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
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body must have at most {self._max_body_bytes} bytes: it has more. Send less.")


def _is_of_this_machine(host: str) -> bool:
    """Whether no DNS server outside can have made this name of a request's host; programs may send none."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        if not host or name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


async def _drain(receive: Receive, limit: int) -> None:
    """Read the rest of a body, up to a limit."""
    size, is_more = 0, True
    while is_more and size <= limit:
        message = await receive()
        size += len(message.get("body", b""))
        is_more = message["type"] == "http.request" and message.get("more_body", False)

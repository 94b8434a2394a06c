"""One client's connection: what it may send before there is a request, and how long it may take."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mola.serving.errors import RequestError

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 1 << 16  # request line and headers together
_LINGER = 1.0  # seconds in which a client that is still sending can read why it was refused


class Connection(H11Protocol):
    """Uvicorn's protocol, which itself waits forever for the rest of a request and for a client that does not read.

    Args:
        max_connections: at the same time, of all clients.
        client_timeout: seconds in which a request has to arrive in full, and what was sent has to be taken.
        arguments: uvicorn's own.
    """

    def __init__(self, max_connections: int, client_timeout: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._max_connections = max_connections
        self._client_timeout = client_timeout
        self._is_refused = False
        self._arriving = _Timer(self.loop)
        self._taking = _Timer(self.loop)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client has connected."""
        tcp = cast(asyncio.Transport, transport)
        super().connection_made(tcp)
        tcp.set_write_buffer_limits(high=0)  # writing is paused as soon as the system takes no more
        most, count = self._max_connections, len(self.connections)
        if count > 2 * most:
            tcp.abort()
        elif count > most:
            self._refuse(_too_many(most))
        else:
            self._arriving.start(self._client_timeout, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if not self._is_refused:
            super().data_received(data)

    def handle_events(self) -> None:
        """Also called by uvicorn after an answer, for what came in the meantime."""
        super().handle_events()
        if self._is_refused or self.transport.is_closing():
            return
        is_between = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        # The third: asked for another protocol, which is not spoken here, with a request that has arrived in full.
        if is_between or self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.MIGHT_SWITCH_PROTOCOL):
            self._arriving.stop()
        else:
            self._arriving.start(self._client_timeout, self._give_up)
        if is_between and self.timeout_keep_alive_task is None:  # after a body that came later than its answer
            seconds = self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        """What was sent waits for the client to read."""
        super().pause_writing()
        self._taking.start(self._client_timeout, self._cut)

    def resume_writing(self) -> None:
        """All of it has been taken."""
        super().resume_writing()
        self._taking.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        self._arriving.stop()
        self._taking.stop()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP."""
        # h11 says in the exception that is being handled which status it has in mind.
        self._refuse(_no_http(getattr(sys.exc_info()[1], "error_status_hint", 400)))

    def _give_up(self) -> None:
        self._refuse(_too_slow(self._client_timeout))

    def _cut(self) -> None:
        logger.info("A connection is cut: its client took nothing for %g s.", self._client_timeout)
        self.transport.abort()

    def _refuse(self, error: RequestError) -> None:
        """Answer without the application, and close."""
        logger.info("A connection is refused: %d.", error.status_code)
        self._is_refused = True
        self._arriving.stop()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun, or was given early
            self.transport.abort()
            return
        if self.cycle is not None:  # for the application the client has left
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = error.response()
        head = [f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}".encode()]
        head += [name + b": " + value for name, value in [*response.raw_headers, (b"connection", b"close")]]
        self.transport.write(b"\r\n".join([*head, b"", bytes(response.body)]))
        # Closing at once would make the system throw away the answer while bytes of the client are unread.
        with contextlib.suppress(OSError):  # the client may have left since the line before
            self.transport.write_eof()
        self.flow.resume_reading()
        self._arriving.start(_LINGER, self.transport.abort)


class _Timer:
    """Calls a function after some seconds, if it is not stopped before; starting it again changes nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, function: Callable[[], None]) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, function)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def _too_many(most: int) -> RequestError:
    return RequestError(
        503,
        f"{most} connections are open, which is this server's limit. Try again later.",
        code="too_many_connections",
        headers={"Retry-After": "1"},
    )


def _too_slow(seconds: float) -> RequestError:
    return RequestError(408, f"the request did not arrive in full within {seconds:g} s. Send it faster.")


def _no_http(status: int) -> RequestError:
    if status == 431:
        return RequestError(status, f"request line and headers must have at most {MAX_HEAD_BYTES} bytes. Send less.")
    if status == 501:
        return RequestError(
            status, "`Transfer-Encoding` must be `chunked`, once. Send the body so, or with its length."
        )
    # Not what was found: it may be a header with a token.
    return RequestError(400, "what came is no HTTP/1.1 request. Send one.")

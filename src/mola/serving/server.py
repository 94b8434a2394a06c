"""The server process: its socket, its signals and its end."""

import asyncio
import ipaddress
import logging
import math
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import uvicorn

from mola.errors import MolaError

logger = logging.getLogger(__name__)

_EXTRA_SECONDS = 5  # between the end of the last answer and the moment uvicorn cuts connections


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket before a model is loaded, so that a port in use is found early. The socket does not listen yet.

    Raises:
        MolaError: this machine has no such address, or another program uses the port.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        if bound is not None:
            bound.close()
        raise MolaError(
            f"`host` {host!r} and `port` {port} cannot be used: {error.strerror or error}. Choose another port, or "
            "end the program that uses it."
        ) from error


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket as a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Answers(Protocol):
    """What generates the answers, as the server sees it."""

    def stop(self) -> None:
        """Start nothing new. Running answers continue."""

    def abort(self) -> None:
        """End all answers."""

    def close(self) -> None:
        """End all answers, and wait until nothing runs any more."""


class Server(uvicorn.Server):
    """A uvicorn server that lets running answers finish when it is stopped.

    Args:
        app: the ASGI application.
        queue: generates the answers; it is closed when the server ends.
        max_connections: maximum number of connections; further connections are answered with status 503.
        shutdown_timeout: seconds that running answers get to finish. After this time, or after a second Ctrl-C,
            they end early with an error.
        greeting: text that is logged as soon as the server listens.
    """

    def __init__(self, app: Any, queue: Answers, max_connections: int, shutdown_timeout: float, greeting: str) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,  # the program configures logging
            log_level="warning",
            access_log=False,  # it would log queries, which may hold a token
            ws="none",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=max_connections + 1,  # uvicorn refuses the connection that reaches the limit
            timeout_graceful_shutdown=math.ceil(shutdown_timeout) + _EXTRA_SECONDS,
        )
        super().__init__(config)
        self._queue = queue
        self._shutdown_timeout = shutdown_timeout
        self._greeting = greeting
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Log the greeting; called by uvicorn when it starts to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        logger.info("%s", self._greeting)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End all answers at the second Ctrl-C; called by uvicorn for SIGINT and SIGTERM."""
        super().handle_exit(sig, frame)
        if self.force_exit and self._loop is not None:  # the second Ctrl-C
            self._loop.call_soon_threadsafe(self._queue.abort)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers finish within the timeout; called by uvicorn after the first signal."""
        self._queue.stop()
        timer = asyncio.get_running_loop().call_later(self._shutdown_timeout, self._queue.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def run_on(self, bound: socket.socket) -> bool:
        """Serve on a bound socket until a signal arrives; return whether the server had started."""
        try:
            self.run(sockets=[bound])
        finally:
            self._queue.close()
        return self.started


@contextmanager
def ignore_signals_after_shutdown() -> Iterator[None]:
    """Keep uvicorn from ending the process: after its shutdown, uvicorn raises the received signals again."""
    names = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(name, lambda *_: None) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)

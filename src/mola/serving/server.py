"""The process side: socket, signals, the end."""

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from mola.serving.addresses import cannot_listen
from mola.serving.connections import MAX_HEAD_BYTES
from mola.serving.queue import AnswerQueue

logger = logging.getLogger(__name__)

_BACKSTOP = 5  # seconds after the queue gave up, before connections are cut


def url_of(bound: socket.socket) -> str:
    """Address of a bound socket, as clients write it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn, which at its end lets the running answer finish, for `shutdown_timeout` seconds at most.

    `protocol` makes a connection's `Connection` of uvicorn's arguments; `greeting` is logged when the server listens.
    """

    def __init__(self, app: Any, queue: AnswerQueue, protocol: Any, shutdown_timeout: float, greeting: str) -> None:
        config = uvicorn.Config(
            app,
            # These two whatever else is installed: the limits are made for them.
            loop="asyncio",
            http=protocol,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            log_config=None,  # as the program has it
            log_level="warning",
            access_log=False,
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(shutdown_timeout) + _BACKSTOP,
        )
        super().__init__(config)
        self._queue = queue
        self._shutdown_timeout = shutdown_timeout
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn; it listens afterwards."""
        await super().startup(sockets)
        if self.started:
            logger.info("%s", self._greeting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after a signal."""
        self._queue.stop()
        timer = asyncio.get_running_loop().call_later(self._shutdown_timeout, self._queue.abort)
        forced = asyncio.create_task(self._end_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            forced.cancel()

    async def _end_when_forced(self) -> None:
        """Cut what runs after a second interrupt: from Python 3.12 on a server that closes waits for connections."""
        while not self.force_exit:
            await asyncio.sleep(0.1)
        self._queue.abort()
        await asyncio.sleep(0.5)  # for answers to say that they end
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def run_on(self, bound: socket.socket) -> bool:
        """Serve until a signal; the model is free afterwards. Whether the server had started."""
        try:
            self.run(sockets=[bound])
        except OSError as error:
            if self.started:
                raise
            host, port = bound.getsockname()[:2]
            raise cannot_listen(host, port, error) from error  # another server has bound it, too, and was faster
        finally:
            self._queue.close()
        return self.started


@contextmanager
def signals_end_quietly() -> Iterator[None]:
    """Uvicorn raises the signals that ended it once more; they shall not end the process before it has cleaned up."""
    names = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(name, lambda *_: None) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)

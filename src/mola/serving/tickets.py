"""A request on its way: its place in the queue, its answers as they are made, and where their pieces arrive."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mola.files.failures import lack_of_memory
from mola.generation.batching.rows import Row
from mola.generation.batching.sampling import TokenLogprobs
from mola.serving.errors import RequestError, internal
from mola.serving.jobs import Job
from mola.serving.metrics import Metrics
from mola.serving.writing import Decoder, Writer

logger = logging.getLogger(__name__)


class Told(NamedTuple):
    """A token, and what was asked about its probability."""

    token_id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True)
class Piece:
    """New text of one choice; the last piece says why it ended and how many tokens it has."""

    choice: int
    text: str
    reason: str | None = None
    num_tokens: int = 0
    told: Sequence[Told] = field(default=())  # of the tokens that came since the piece before


class Ticket:
    """A request's place in the queue, and where its pieces arrive. Made on the event loop that hears of it."""

    def __init__(self, jobs: Sequence[Job], model: str, streams: bool, leave: Callable[["Ticket"], None]) -> None:
        self.jobs, self.model, self.streams = jobs, model, streams
        self.unwanted = threading.Event()
        self.arrived: asyncio.Queue[Piece | RequestError] = asyncio.Queue()
        self.submitted = time.monotonic()
        self.begun: float | None = None
        self.missing = len(jobs)  # choices
        self._leave = leave
        self._loop = asyncio.get_running_loop()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece until all choices have ended; a `RequestError` if the server stops or failed."""
        missing = len(self.jobs)
        while missing:
            piece = await self.arrived.get()
            if isinstance(piece, RequestError):
                raise piece
            missing -= piece.reason is not None
            yield piece

    def cancel(self, error: RequestError | None = None) -> None:
        """Nobody wants the rest: a waiting request leaves the queue, a running one ends at its next token."""
        if error is not None:
            self.arrived.put_nowait(error)
        self.unwanted.set()
        self._leave(self)

    def arrive(self, piece: Piece | RequestError) -> None:
        """Hand on a piece; called on the thread that makes answers."""
        if isinstance(piece, RequestError):
            self.unwanted.set()  # its other choices
        elif piece.reason is not None:
            self.missing -= 1  # before its reader can know, and leave
        self._call(self.arrived.put_nowait, piece)
        if self.unwanted.is_set() or not self.missing:
            self._call(self._leave, self)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        if not self._loop.is_closed():  # a server that was told twice to stop does not wait
            self._loop.call_soon_threadsafe(function, *arguments)


class Answer:
    """Listens to one choice of a ticket."""

    def __init__(self, ticket: Ticket, choice: int, decoder: Decoder, metrics: Metrics) -> None:
        self._ticket, self._choice, self._metrics = ticket, choice, metrics
        self._told: list[Told] = []
        self._writer = Writer(decoder, self._send if ticket.streams else None, ticket.jobs[choice].stops)

    def row(self) -> Row:
        """What is to be made."""
        job = self._ticket.jobs[self._choice]
        return Row(job.adapter, job.prompt, job.sampling, self)

    def is_unwanted(self) -> bool:
        """Whether the client has gone."""
        return self._ticket.unwanted.is_set()

    def begins(self) -> None:
        """The request waits no longer."""
        if self._ticket.begun is None:
            self._ticket.begun = time.monotonic()

    def takes(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """Write it; whether the answer goes on."""
        if not self._writer.token_ids:
            self._metrics.first_token(time.monotonic() - self._ticket.submitted)
        self._metrics.tokens.inc()
        if logprobs is not None:
            self._told.append(Told(token_id, logprobs))
        return self._writer.take(token_id)

    def ends(self) -> None:
        """Send what is left, and why it ended."""
        reason = self._writer.finish()
        text = "" if self._ticket.streams else self._writer.text
        self._ticket.arrive(Piece(self._choice, text, reason, len(self._writer.token_ids), self._take_told()))

    def fails(self, error: Exception) -> None:
        """End the request with an error."""
        lack = lack_of_memory(error)
        if lack is None:
            logger.error("A request failed.", exc_info=error)
            self._ticket.arrive(internal())
        else:
            logger.warning("Out of memory: %s.", lack)
            self._ticket.arrive(RequestError(503, "the server's memory did not suffice for this request. Shorten it."))

    def _send(self, text: str) -> None:
        self._ticket.arrive(Piece(self._choice, text, told=self._take_told()))

    def _take_told(self) -> list[Told]:
        told, self._told = self._told, []
        return told

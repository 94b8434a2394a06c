"""One answer after the other, first come, first served.

One at a time because every answer has to be the one that `mola generate` gives, whatever else is asked at the same
moment: batches round in another way, and the layers have one active adapter at a time.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mola._compat import set_adapter_to_infer
from mola.files.failures import lack_of_memory
from mola.generation import predicting
from mola.generation.decoding import seeded
from mola.serving.errors import RequestError, internal
from mola.serving.jobs import Job
from mola.serving.writing import AnswerEndedError, Writer

logger = logging.getLogger(__name__)

_FIRST_GUESS = 1.0  # seconds per request, before any was measured
_MEMORY = 0.8  # weight of what was known when a new time comes in


@dataclass(frozen=True)
class Piece:
    """New text of one choice; the last piece says why it ended and how many tokens it has."""

    choice: int
    text: str
    reason: str | None = None
    num_tokens: int = 0


class Ticket:
    """A request's place in the queue, and where its pieces arrive."""

    def __init__(self, jobs: Sequence[Job], streams: bool) -> None:
        self.jobs = jobs
        self.streams = streams
        self.has_started = False
        self.unwanted = threading.Event()
        self.task: asyncio.Task[None] | None = None
        self.arrived: asyncio.Queue[Piece | RequestError] = asyncio.Queue()

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
        if self.task is not None and not self.has_started:
            self.task.cancel()


class AnswerQueue:
    """Owns a model of `load_model`: nothing else may use it while the queue is open.

    At most `max_waiting` requests wait while one runs.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, max_waiting: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_waiting = max_waiting
        self._turn = asyncio.Lock()
        self._tickets: set[Ticket] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mola-generate")
        self._seconds = _FIRST_GUESS
        self._is_stopping = False

    def counts(self) -> dict[str, int]:
        """Requests that run and wait."""
        running = sum(ticket.has_started for ticket in self._tickets)
        return {"running": running, "waiting": len(self._tickets) - running}

    def submit(self, jobs: Sequence[Job], streams: bool) -> Ticket:
        """Put a request in the queue.

        Raises:
            RequestError: 429 when too many wait, 503 when the server stops.
        """
        self.check_room()
        ticket = Ticket(jobs, streams)
        self._tickets.add(ticket)
        ticket.task = asyncio.create_task(self._serve(ticket))
        # A task that is cancelled before its first step runs none of its code.
        ticket.task.add_done_callback(lambda _: self._tickets.discard(ticket))
        return ticket

    def check_room(self) -> None:
        """Refuse a request that could not be put in the queue, as `submit` does."""
        if self._is_stopping:
            raise _stopping()
        if len(self._tickets) > self._max_waiting:
            raise RequestError(
                429,
                f"{self._max_waiting} requests are waiting, which is this server's limit. Try again later.",
                code="queue_full",
                headers={"Retry-After": str(max(1, math.ceil(self._seconds)))},
            )

    def stop(self) -> None:
        """Take nothing new and send away who waits; what runs goes on."""
        self._is_stopping = True
        for ticket in list(self._tickets):
            if not ticket.has_started:
                ticket.cancel(_stopping())

    def abort(self) -> None:
        """End what still runs, at its next token."""
        self.stop()
        for ticket in list(self._tickets):
            ticket.cancel(_stopping())

    def close(self) -> None:
        """Wait until the model is free."""
        for ticket in list(self._tickets):
            ticket.unwanted.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _serve(self, ticket: Ticket) -> None:
        loop = asyncio.get_running_loop()

        def arrive(piece: Piece | RequestError) -> None:
            if not loop.is_closed():  # a server that was told twice to stop does not wait
                loop.call_soon_threadsafe(ticket.arrived.put_nowait, piece)

        async with self._turn:
            ticket.has_started = True
            start = time.monotonic()
            await loop.run_in_executor(self._thread, self._answer_all, ticket, arrive)
            self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * (time.monotonic() - start)

    def _answer_all(self, ticket: Ticket, arrive: Any) -> None:
        try:
            for choice, job in enumerate(ticket.jobs):
                self._answer(ticket, choice, job, arrive)
        except Exception as error:
            lack = lack_of_memory(error)
            if lack is None:
                logger.exception("A request failed.")
                arrive(internal())
            else:
                logger.warning("Out of memory: %s.", lack)
                arrive(RequestError(503, "the server's memory did not suffice for this request. Shorten it."))

    def _answer(self, ticket: Ticket, choice: int, job: Job, arrive: Any) -> None:
        def send(text: str) -> None:
            arrive(Piece(choice, text))

        writer = Writer(self._tokenizer, send if ticket.streams else None, job.stops, ticket.unwanted.is_set)
        try:
            with self._using(job.adapter), seeded(job.seed), predicting.inference_state(self._model):
                predicting.generate_batch(self._model, self._tokenizer, [job.prompt], streamer=writer, **job.decoding)
        except AnswerEndedError:
            if ticket.unwanted.is_set():
                return
        reason = writer.finish()
        arrive(Piece(choice, "" if ticket.streams else writer.text, reason, len(writer.token_ids)))

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        """The model with one adapter, or with none."""
        if adapter is None:
            if isinstance(self._model, PeftModel):
                with self._model.disable_adapter():
                    yield
            else:
                yield
            return
        if self._model.active_adapter != adapter:
            set_adapter_to_infer(self._model, adapter)
        yield


def _stopping() -> RequestError:
    return RequestError(503, "the server is being stopped.", code="stopping", headers={"Retry-After": "5"})

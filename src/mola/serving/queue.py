"""The queue: requests wait first come, first served, for an engine that makes their answers on a thread of its own."""

import asyncio
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from transformers import PreTrainedTokenizerBase

from mola.generation import predicting
from mola.generation.batching.engine import BatchEngine
from mola.generation.batching.forward import Adapters
from mola.generation.batching.rows import Row
from mola.generation.batching.single import SingleEngine
from mola.serving.errors import RequestError
from mola.serving.jobs import Job
from mola.serving.metrics import Metrics
from mola.serving.tickets import Answer, Ticket
from mola.serving.writing import Decoder

logger = logging.getLogger(__name__)

_FIRST_GUESS = 1.0  # seconds per request, before any was measured
_MEMORY = 0.8  # weight of what was known when a new time comes in


class AnswerQueue:
    """Owns a model of `load_model`: nothing else may use it while the queue is open.

    Args:
        adapters: of the model.
        engine: makes the answers.
        tokenizer: of the model.
        max_running: requests that an engine may have begun.
        max_waiting: requests that may wait besides.
        metrics: counts what happens.
        hint: said once in the log when the queue is full.
    """

    def __init__(
        self,
        adapters: Adapters,
        engine: BatchEngine | SingleEngine,
        tokenizer: PreTrainedTokenizerBase,
        max_running: int,
        max_waiting: int,
        metrics: Metrics,
        hint: str = "",
    ) -> None:
        self._adapters, self._engine, self._metrics = adapters, engine, metrics
        metrics.batch_size.set_function(lambda: engine.num_active)
        self._decoder = Decoder(tokenizer, predicting.end_token_ids(adapters.model, tokenizer))
        self._max_running, self._max_waiting = max_running, max_waiting
        self._hint = hint
        self._tickets: dict[Ticket, None] = {}
        self._seconds = _FIRST_GUESS
        self._is_stopping = self._is_closed = self._is_broken = False
        self._news = threading.Condition()  # guards the three below
        self._rows: list[Row] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._leaving: dict[str, Future[None]] = {}
        self._thread = threading.Thread(target=self._work, name="mola-generate", daemon=True)
        self._thread.start()

    def counts(self) -> dict[str, int]:
        """Requests that run and wait."""
        running = sum(ticket.begun is not None for ticket in self._tickets)
        return {"running": running, "waiting": len(self._tickets) - running}

    def submit(self, jobs: Sequence[Job], model: str, streams: bool) -> Ticket:
        """Put a request in the queue.

        Args:
            jobs: its answers.
            model: what it calls the model.
            streams: whether pieces are sent as they come.

        Raises:
            RequestError: 429 when too many wait, 503 when the server stops.
        """
        self.check_room()
        ticket = Ticket(jobs, model, streams, self._forget)
        self._tickets[ticket] = None
        rows = [Answer(ticket, choice, self._decoder, self._metrics).row() for choice in range(len(jobs))]
        with self._news:
            self._rows += rows
            self._news.notify()
        if self._is_broken:  # meanwhile
            ticket.arrive(_broken())
        return ticket

    def check_room(self) -> None:
        """Refuse a request that could not be put in the queue, as `submit` does."""
        if self._is_stopping:
            raise _stopping()
        self.check_alive()
        if len(self._tickets) < self._max_running + self._max_waiting:
            return
        if self._hint:
            logger.warning("The queue is full. %s", self._hint)
            self._hint = ""
        raise RequestError(
            429,
            f"This server takes {self._max_running + self._max_waiting} requests at a time, running or waiting. Try "
            "again later.",
            code="queue_full",
            headers={"Retry-After": str(max(1, math.ceil(self._seconds)))},
        )

    @property
    def is_mixed(self) -> bool:
        """Whether answers with different adapters are being made; to be asked in a function of `call`."""
        return self._engine.is_mixed

    def check_alive(self) -> None:
        """Raise a `RequestError` if no answer can be made any more."""
        if self._is_broken:
            raise _broken()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function that changes the model, between two tokens."""
        self.check_alive()
        future: Future[Any] = Future()
        with self._news:
            self._calls.append((function, future))
            self._news.notify()
        self.check_alive()  # once more: nobody takes it any more
        return await asyncio.wrap_future(future)

    async def remove(self, adapter: str) -> None:
        """Take an adapter out of the model once no answer uses it; the caller sees to it that none follows."""
        self.check_alive()
        future: Future[None] = Future()
        with self._news:
            self._leaving[adapter] = future
            self._news.notify()
        self.check_alive()
        await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Take nothing new and send away who waits; what runs goes on."""
        self._is_stopping = True
        for ticket in list(self._tickets):
            if ticket.begun is None:
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
        with self._news:
            self._is_closed = True
            self._news.notify()
        self._thread.join()

    def _forget(self, ticket: Ticket) -> None:
        """A ticket has ended; on the event loop."""
        if ticket not in self._tickets:
            return
        del self._tickets[ticket]
        with self._news:  # which an engine that makes one answer at a time takes between two answers only
            self._rows = [row for row in self._rows if not row.listener.is_unwanted()]
        outcome = "finished" if not ticket.missing else "unfinished"
        self._metrics.request_ended(ticket.model, outcome, time.monotonic() - ticket.submitted)
        if ticket.begun is not None and not ticket.missing:
            # Until the next one has its turn: so many run side by side.
            seconds = (time.monotonic() - ticket.begun) / (1 + self.counts()["running"])
            self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * seconds

    # ------------------------------------------------------------------ on the thread that makes answers

    def _work(self) -> None:
        try:
            with predicting.inference_state(self._adapters.model):
                while self._take_news():
                    if not self._engine.is_idle:
                        self._engine.step()
                self._adapters.leave()
        except Exception as error:  # a mistake of ours: nobody may wait for this thread
            logger.critical("No answer can be made any more. Restart the server.", exc_info=error)
            self._is_broken = True
            for ticket in list(self._tickets):
                ticket.arrive(_broken())
        for future in (*(future for _, future in self._calls), *self._leaving.values()):
            future.cancel()

    def _take_news(self) -> bool:
        """Take what came in; sleep while there is nothing to do. False at the end."""
        with self._news:
            while not (self._rows or self._calls or self._leaving or self._is_closed) and self._engine.is_idle:
                self._news.wait()
            rows, self._rows = self._rows, []
            calls, self._calls = self._calls, []
            if self._is_closed:
                return False
        for row in rows:
            self._engine.add(row)
        for function, future in calls:
            _run(function, future, self._adapters)
        with self._news:
            wanted = {row.adapter for row in self._rows}  # of requests that came while functions ran
            names = [name for name in self._leaving if name not in wanted and not self._engine.uses(name)]
            unused = {name: self._leaving.pop(name) for name in names}
        for name, future in unused.items():
            _run(functools.partial(self._adapters.delete, name), future, self._adapters)
        return True


def _run(function: Callable[[], Any], future: Future[Any], adapters: Adapters) -> None:
    if not future.set_running_or_notify_cancel():  # who asked has gone, as when the server is stopped
        return
    adapters.leave()
    try:
        try:
            result = function()
        finally:
            adapters.changed()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _broken() -> RequestError:
    return RequestError(500, "this server cannot make answers any more; its log says why. It has to be restarted.")


def _stopping() -> RequestError:
    return RequestError(503, "the server is being stopped.", code="stopping", headers={"Retry-After": "5"})

"""The queue of requests. Requests are served in the order of their arrival, by an engine on a thread of its own."""

import asyncio
import functools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from mola.generation import predicting
from mola.generation.batching.engine import BatchEngine, SingleEngine
from mola.generation.batching.forward import Adapters
from mola.generation.batching.rows import Row, TokenLogprobs
from mola.serving.jobs import Job
from mola.serving.metrics import Metrics
from mola.serving.responses import RequestError, to_request_error
from mola.serving.stream_writer import AnswerPiece, StreamWriter, TokenDecoder

logger = logging.getLogger(__name__)

_FIRST_GUESS = 1.0  # seconds per request, until the first request was measured
_OLD_WEIGHT = 0.8  # weight of the earlier requests in the running mean of the seconds per request


class QueuedRequest:
    """A request in the queue: its jobs, and the pieces of its answers as they are generated.

    Args:
        jobs: one for each answer.
        model: the model's name in the request.
        is_streamed: whether pieces are sent as they come.
        on_end: called on the event loop when all answers have ended or the request is cancelled.
    """

    def __init__(
        self, jobs: Sequence[Job], model: str, is_streamed: bool, on_end: Callable[["QueuedRequest"], None]
    ) -> None:
        self.jobs, self.model, self.is_streamed = jobs, model, is_streamed
        self.is_cancelled = threading.Event()
        self.submitted = time.monotonic()
        self.started: float | None = None  # when the first of its answers left the queue
        self.num_open = len(jobs)  # answers that have not ended
        self._pieces: asyncio.Queue[AnswerPiece | RequestError] = asyncio.Queue()
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """Every piece until all answers have ended.

        Raises:
            RequestError: the server stops, or an answer failed.
        """
        num_open = len(self.jobs)
        while num_open:
            piece = await self._pieces.get()
            if isinstance(piece, RequestError):
                raise piece
            num_open -= piece.finish_reason is not None
            yield piece

    def cancel(self, error: RequestError | None = None) -> None:
        """Take a waiting request out of the queue, or end a running one at its next token.

        The client receives `error`.
        """
        if error is not None:
            self._pieces.put_nowait(error)
        self.is_cancelled.set()
        self._on_end(self)

    def add_piece(self, piece: AnswerPiece | RequestError) -> None:
        """Hand a piece to the event loop; called on the engine's thread."""
        if isinstance(piece, RequestError):
            self.is_cancelled.set()  # ends the remaining answers of this request, too
        elif piece.finish_reason is not None:
            self.num_open -= 1  # must happen before the event loop sees the piece
        self._call_on_loop(self._pieces.put_nowait, piece)
        if self.is_cancelled.is_set() or not self.num_open:
            self._call_on_loop(self._on_end, self)

    def _call_on_loop(self, function: Callable[..., object], *arguments: object) -> None:
        if not self._loop.is_closed():  # a second Ctrl-C closes the loop
            self._loop.call_soon_threadsafe(function, *arguments)


class _AnswerListener:
    """Receives the tokens of one answer from the engine, and hands its text to the request."""

    def __init__(self, request: QueuedRequest, choice: int, decoder: TokenDecoder, metrics: Metrics) -> None:
        self._request, self._choice, self._metrics = request, choice, metrics
        self._logprobs: list[TokenLogprobs] = []  # one for each token since the last piece
        send = self._send if request.is_streamed else None
        self._writer = StreamWriter(decoder, send, request.jobs[choice].stops)

    def is_cancelled(self) -> bool:
        return self._request.is_cancelled.is_set()

    def on_start(self) -> None:
        if self._request.started is None:
            self._request.started = time.monotonic()

    def on_token(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """Add the next token; return whether generation should continue, which is False after a complete stop text."""
        if not self._writer.token_ids:
            self._metrics.first_token.observe(time.monotonic() - self._request.submitted)
        self._metrics.generated_tokens.inc()
        if logprobs is not None:
            self._logprobs.append(logprobs)
        return self._writer.add(token_id)

    def on_end(self) -> None:
        finish_reason = self._writer.finish()
        text = "" if self._request.is_streamed else self._writer.text
        num_tokens = len(self._writer.token_ids)
        self._request.add_piece(AnswerPiece(self._choice, text, finish_reason, num_tokens, self._take_logprobs()))

    def on_error(self, error: Exception) -> None:
        answer = to_request_error(error)
        if answer.status_code != 503:  # 503 means that memory ran out
            logger.error("A request failed.", exc_info=error)
        self._request.add_piece(answer)

    def _send(self, text: str) -> None:
        self._request.add_piece(AnswerPiece(self._choice, text, logprobs=self._take_logprobs()))

    def _take_logprobs(self) -> list[TokenLogprobs]:
        logprobs, self._logprobs = self._logprobs, []
        return logprobs


class RequestQueue:
    """Owns a model: nothing else may use the model until the queue is closed.

    Args:
        adapters: the model's adapters.
        engine: generates the answers.
        decoder: decodes with the model's tokenizer.
        max_running: number of requests that the engine may have started.
        max_waiting: number of further requests that may wait.
        metrics: counts requests and tokens.
    """

    def __init__(
        self,
        adapters: Adapters,
        engine: BatchEngine | SingleEngine,
        decoder: TokenDecoder,
        max_running: int,
        max_waiting: int,
        metrics: Metrics,
    ) -> None:
        self._adapters, self._engine, self._decoder, self._metrics = adapters, engine, decoder, metrics
        metrics.watch(self.counts, lambda: engine.num_active)
        self._max_requests = max_running + max_waiting
        self._requests: dict[QueuedRequest, None] = {}  # an ordered set
        self._mean_seconds = _FIRST_GUESS
        self._is_stopping = self._is_closed = self._is_broken = False
        self._changed = threading.Condition()  # guards the three fields below
        self._new_rows: list[Row] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._removals: dict[str, Future[None]] = {}  # adapters to remove
        self._thread = threading.Thread(target=self._work, name="mola-generate", daemon=True)
        self._thread.start()

    def counts(self) -> dict[str, int]:
        """Numbers of running and waiting requests."""
        running = sum(request.started is not None for request in self._requests)
        return {"running": running, "waiting": len(self._requests) - running}

    def submit(self, jobs: Sequence[Job], model: str, is_streamed: bool) -> QueuedRequest:
        """Put a request in the queue.

        Args:
            jobs: one for each answer of the request.
            model: the model's name in the request.
            is_streamed: whether pieces are sent as they come.

        Raises:
            RequestError: 429 if too many requests wait, 503 if the server is stopping.
        """
        self.check_room()
        request = QueuedRequest(jobs, model, is_streamed, self._forget)
        self._requests[request] = None
        rows = []
        for choice, job in enumerate(jobs):
            listener = _AnswerListener(request, choice, self._decoder, self._metrics)
            rows.append(Row(job.adapter, job.prompt, job.sampling, listener))
        with self._changed:
            self._new_rows += rows
            self._changed.notify()
        if self._is_broken:  # the engine failed after `check_room`
            request.add_piece(_broken_error())
        return request

    def check_room(self) -> None:
        """Raise the error that `submit` would raise. Call it before work is done for a request."""
        if self._is_stopping:
            raise _stopping_error()
        self.check_alive()
        if len(self._requests) < self._max_requests:
            return
        raise RequestError(
            429,
            f"This server accepts {self._max_requests} requests at a time, running or waiting. Try again later.",
            code="queue_full",
            headers={"Retry-After": str(max(1, math.ceil(self._mean_seconds)))},
        )

    @property
    def is_mixed(self) -> bool:
        """Whether answers with different adapters are being generated; valid inside a function of `call`."""
        return self._engine.is_mixed

    def check_alive(self) -> None:
        """Raise a `RequestError` if the engine's thread has failed."""
        if self._is_broken:
            raise _broken_error()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function that changes the model on the engine's thread, between two tokens."""
        self.check_alive()
        future: Future[Any] = Future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify()
        self.check_alive()  # if the thread failed in between, it would never run the function
        return await asyncio.wrap_future(future)

    async def remove(self, adapter: str) -> None:
        """Remove an adapter from the model as soon as no answer uses it. The caller submits no more answers with it."""
        self.check_alive()
        future: Future[None] = Future()
        with self._changed:
            self._removals[adapter] = future
            self._changed.notify()
        self.check_alive()
        await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Refuse new requests and end the waiting ones with an error. Running requests continue."""
        self._is_stopping = True
        for request in list(self._requests):
            if request.started is None:
                request.cancel(_stopping_error())

    def abort(self) -> None:
        """End all requests with an error, running ones at their next token."""
        self._is_stopping = True
        for request in list(self._requests):
            request.cancel(_stopping_error())

    def close(self) -> None:
        """End all requests and wait until the engine's thread has ended."""
        for request in list(self._requests):
            request.is_cancelled.set()
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _forget(self, request: QueuedRequest) -> None:
        """Remove a request that has ended or is cancelled; runs on the event loop."""
        if request not in self._requests:
            return
        del self._requests[request]
        with self._changed:
            # `SingleEngine` accepts new rows only between two answers, so cancelled rows would pile up in this list.
            self._new_rows = [row for row in self._new_rows if not row.listener.is_cancelled()]
        is_finished = not request.num_open
        seconds = time.monotonic() - request.submitted
        self._metrics.request_ended(request.model, "finished" if is_finished else "unfinished", seconds)
        if request.started is not None and is_finished:
            # Several requests run side by side, so a place becomes free sooner than one request takes.
            seconds = (time.monotonic() - request.started) / (1 + self.counts()["running"])
            self._mean_seconds = _OLD_WEIGHT * self._mean_seconds + (1 - _OLD_WEIGHT) * seconds

    # The methods below run on the engine's thread.

    def _work(self) -> None:
        try:
            with predicting.inference_state(self._adapters.model):
                while self._take_changes():
                    if not self._engine.is_idle:
                        self._engine.step()
                self._adapters.restore()
        except Exception as error:
            logger.critical("The engine failed. Restart the server: it can no longer generate answers.", exc_info=error)
            self._is_broken = True
            for request in list(self._requests):
                request.add_piece(_broken_error())
        for future in (*(future for _, future in self._calls), *self._removals.values()):
            future.cancel()

    def _take_changes(self) -> bool:
        """Hand new rows to the engine, run functions and remove adapters; return False once the queue is closed.

        Sleeps while there is nothing to do.
        """
        with self._changed:
            while not (self._new_rows or self._calls or self._removals or self._is_closed) and self._engine.is_idle:
                self._changed.wait()
            rows, self._new_rows = self._new_rows, []
            calls, self._calls = self._calls, []
            if self._is_closed:
                return False
        for row in rows:
            self._engine.add(row)
        for function, future in calls:
            self._run(function, future)
        with self._changed:
            new = {row.adapter for row in self._new_rows}  # rows of requests that arrived while the functions ran
            unused = [name for name in self._removals if name not in new and not self._engine.uses(name)]
            removals = {name: self._removals.pop(name) for name in unused}
        for name, future in removals.items():
            self._run(functools.partial(self._adapters.delete, name), future)
        return True

    def _run(self, function: Callable[[], Any], future: Future[Any]) -> None:
        """Run a function that changes the model, and set the future to its result."""
        if not future.set_running_or_notify_cancel():  # the client has left
            return
        self._adapters.restore()
        try:
            try:
                result = function()
            finally:
                self._adapters.refresh()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)


def _broken_error() -> RequestError:
    return RequestError(500, "this server can no longer generate answers; its log says why. It must be restarted.")


def _stopping_error() -> RequestError:
    return RequestError(503, "the server is being stopped.", code="stopping", headers={"Retry-After": "5"})

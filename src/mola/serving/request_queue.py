"""The queue of requests. Requests are served in the order of their arrival, by an engine on a thread of its own."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from mola.generation import predicting
from mola.generation.batching.engine import BatchEngine, SingleEngine
from mola.generation.batching.forward import Adapters
from mola.generation.batching.rows import Row, TokenLogprobs
from mola.generation.batching.skills import Skills
from mola.serving.jobs import Job
from mola.serving.metrics import Metrics
from mola.serving.responses import RequestError, to_request_error
from mola.serving.stream_writer import AnswerPiece, StreamWriter, TokenDecoder

logger = logging.getLogger(__name__)

_FIRST_GUESS = 1.0  # seconds per request, until the first request was measured
_OLD_WEIGHT = 0.8  # weight of the earlier requests in the running mean of the seconds per request
_REMOVAL_PAUSE = 0.02  # seconds between two checks whether an adapter is still in use


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
        # A prompt with several answers counts once.
        self.num_prompt_tokens = sum(map(len, {id(job.prompt): job.prompt for job in jobs}.values()))
        self.rows: list[Row] = []  # the engine's form of the jobs; empty once the request has ended
        self.is_cancelled = False
        self.submitted = time.monotonic()
        self.started: float | None = None  # when the first of its answers left the queue
        self.num_open = len(jobs)  # answers that have not ended
        self._pieces: asyncio.Queue[AnswerPiece | RequestError] = asyncio.Queue()
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()

    @property
    def skills(self) -> list[str | None]:
        """The skill that gives each answer, of a model with skills; None is the base model."""
        return [job.adapter for job in self.jobs]

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
        self.is_cancelled = True
        self._on_end(self)

    def add_piece(self, piece: AnswerPiece | RequestError) -> None:
        """Hand a piece to the event loop; called on the engine's thread."""
        if isinstance(piece, RequestError):
            self.is_cancelled = True  # ends the remaining answers of this request, too
        elif piece.finish_reason is not None:
            self.num_open -= 1  # must happen before the event loop sees the piece
        if self._loop.is_closed():  # a second Ctrl-C closes the loop
            return
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        if self.is_cancelled or not self.num_open:
            self._loop.call_soon_threadsafe(self._on_end, self)


class _AnswerListener:
    """Receives the tokens of one answer from the engine, and hands its text to the request."""

    def __init__(self, request: QueuedRequest, choice: int, decoder: TokenDecoder, metrics: Metrics) -> None:
        self._request, self._choice, self._metrics = request, choice, metrics
        self._logprobs: list[TokenLogprobs] = []  # one for each token since the last piece
        send = self._send if request.is_streamed else None
        self._writer = StreamWriter(decoder, send, request.jobs[choice].stops)

    def is_cancelled(self) -> bool:
        return self._request.is_cancelled

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
        self._send(text, finish_reason, len(self._writer.token_ids))

    def on_error(self, error: Exception) -> None:
        answer = to_request_error(error)
        if answer.status_code != 503:  # 503 means that memory ran out
            logger.error("A request failed.", exc_info=error)
        self._request.add_piece(answer)

    def _send(self, text: str, finish_reason: str | None = None, num_tokens: int = 0) -> None:
        logprobs, self._logprobs = self._logprobs, []
        self._request.add_piece(AnswerPiece(self._choice, text, finish_reason, num_tokens, logprobs))


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
        adapters: Adapters | Skills,
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
        # Only this thread uses the model. It runs what it is given in order, and each engine step plans the next one,
        # so new rows and changes of the model come between two steps.
        self._thread = ThreadPoolExecutor(1, "mola-generate")
        self._inference = ExitStack()
        self._thread.submit(self._inference.enter_context, predicting.inference_state(adapters.model)).result()
        self._inference.callback(adapters.restore)

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
        for choice, job in enumerate(jobs):
            listener = _AnswerListener(request, choice, self._decoder, self._metrics)
            request.rows.append(Row(job.adapter, job.prompt, job.sampling, listener))
        self._requests[request] = None
        self._thread.submit(self._add, request.rows)
        if self._is_broken:  # the engine failed after `check_room`
            request.add_piece(_broken_error())
        return request

    def check_room(self) -> None:
        """Raise the error that `submit` would raise. Call it before work is done for a request."""
        if self._is_stopping:
            raise _stopping_error()
        self.check_alive()
        if len(self._requests) >= self._max_requests:
            raise RequestError(
                429,
                f"This server accepts {self._max_requests} requests at a time, running or waiting. Try again later.",
                code="queue_full",
                headers={"Retry-After": str(max(1, math.ceil(self._mean_seconds)))},
            )

    def check_alive(self) -> None:
        """Raise a `RequestError` if the engine has failed."""
        if self._is_broken:
            raise _broken_error()

    @property
    def is_mixed(self) -> bool:
        """Whether answers with different adapters are being generated; valid inside a function of `call`."""
        return self._engine.is_mixed

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function that changes the model on the engine's thread, between two tokens."""
        self.check_alive()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._change_model, function)

    async def decide(self, prompts: Sequence[Sequence[int]]) -> list[str | None]:
        """The skill of each prompt, decided on the engine's thread between two tokens."""
        assert isinstance(self._adapters, Skills)
        self.check_alive()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._adapters.decide, prompts)

    async def add_skill(self, name: str, folder: str, statistics: Any) -> None:
        """Add a skill to a model with skills, between two tokens."""
        await self.call(lambda: self._adapters.model.skills.add(name, folder, statistics))

    async def remove_skill(self, name: str) -> None:
        """Let nobody ask a skill any more, and remove it as soon as no answer uses it."""
        await self.call(lambda: self._adapters.model.skills.retire(name))
        await self.remove(name)

    async def remove(self, adapter: str) -> None:
        """Remove an adapter from the model as soon as no answer uses it. The caller submits no more answers with it."""
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(self._thread, self._engine.uses, adapter):
            self.check_alive()
            await asyncio.sleep(_REMOVAL_PAUSE)
        await self.call(lambda: self._adapters.delete(adapter))

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
            request.is_cancelled = True
        self._is_closed = True
        self._thread.submit(self._inference.close)
        self._thread.shutdown()

    def _forget(self, request: QueuedRequest) -> None:
        """Remove a request that has ended or is cancelled; runs on the event loop."""
        if request not in self._requests:
            return
        del self._requests[request]
        # `SingleEngine` accepts rows only between two answers. Until then the rows of cancelled requests would pile up.
        request.rows.clear()
        now, is_finished = time.monotonic(), not request.num_open
        self._metrics.requests.labels(request.model, "finished" if is_finished else "unfinished").inc()
        if is_finished and isinstance(self._adapters, Skills):
            self._metrics.count_answers(request.skills)
        self._metrics.request_seconds.observe(now - request.submitted)
        if request.started is not None and is_finished:
            # Several requests run side by side, so a place becomes free sooner than one request takes.
            seconds = (now - request.started) / (1 + self.counts()["running"])
            self._mean_seconds = _OLD_WEIGHT * self._mean_seconds + (1 - _OLD_WEIGHT) * seconds

    # The methods below run on the engine's thread.

    def _add(self, rows: list[Row]) -> None:
        """Hand new rows to the engine, and start its steps if it was idle."""
        was_idle = self._engine.is_idle
        for row in rows:
            self._engine.add(row)
        if was_idle and not self._engine.is_idle:
            self._thread.submit(self._step)

    def _step(self) -> None:
        """Let the engine do one step, and plan the next one if answers are left."""
        if self._is_closed:
            return
        try:
            self._engine.step()
        except Exception as error:
            logger.critical("The engine failed. Restart the server: it can no longer generate answers.", exc_info=error)
            self._is_broken = True
            for request in list(self._requests):
                request.add_piece(_broken_error())
            return
        if not (self._engine.is_idle or self._is_closed):
            self._thread.submit(self._step)

    def _change_model(self, function: Callable[[], Any]) -> Any:
        self._adapters.restore()
        try:
            return function()
        finally:
            self._adapters.refresh()


def _broken_error() -> RequestError:
    return RequestError(500, "this server can no longer generate answers; its log says why. It must be restarted.")


def _stopping_error() -> RequestError:
    return RequestError(503, "the server is being stopped.", code="stopping", headers={"Retry-After": "5"})

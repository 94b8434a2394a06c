"""The routes: OpenAI's completions, chat completions and models; adapters to load; `/health` and `/metrics`."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from mola.serving.answers import ChatForm, CompletionForm, count_usage
from mola.serving.errors import RequestError, add_handlers
from mola.serving.guard import GONE, Checks, Guard
from mola.serving.jobs import JobMaker
from mola.serving.metrics import Metrics
from mola.serving.queue import AnswerQueue
from mola.serving.requests import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from mola.serving.shelf import Shelf
from mola.serving.tickets import Piece, Ticket


def build_app(jobs: JobMaker, queue: AnswerQueue, shelf: Shelf, metrics: Metrics, checks: Checks) -> FastAPI:
    """The ASGI application; `checks` are those of every request, before its body is read."""
    # A redirect would lead to whatever the client wrote as `Host`.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Guard, checks=checks, count=metrics.responded)
    add_handlers(app)
    created = int(time.time())
    encoding = asyncio.Lock()

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "mola"}

    async def answer(request: Request, body: ChatRequest | CompletionRequest, form: Any) -> Response:
        queue.check_room()
        # Long prompts take a while; one at a time, because tokenizers keep state.
        async with encoding:
            made = await run_in_threadpool(jobs.make, body)
            while any(job.adapter != jobs.adapter(body.model) for job in made):  # another has taken its place meanwhile
                made = await run_in_threadpool(jobs.make, body)
        ticket = queue.submit(made, body.model, streams=bool(body.stream))
        metrics.prompt_tokens.inc(_prompt_tokens(ticket))
        if body.stream:
            return EventStream(ticket, _events(ticket, form, body.wants_usage()))
        return await _whole(request, ticket, form)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(request, body, ChatForm(body.model, jobs.spell))

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, body, CompletionForm(body.model, jobs.spell, jobs.decode))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in jobs.names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        jobs.adapter(name)
        return model(name)

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(body: LoadRequest) -> dict[str, str]:
        await shelf.load(body.lora_name, body.lora_path, body.load_inplace)
        return {"status": "ok", "lora_name": body.lora_name}

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: UnloadRequest) -> dict[str, str]:
        await shelf.unload(body.lora_name)
        return {"status": "ok", "lora_name": body.lora_name}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        queue.check_alive()
        return {"status": "ok"} | queue.counts()

    return app


class EventStream(StreamingResponse):
    """Server-sent events; its ticket ends with it, also if the client was gone before the first event."""

    def __init__(self, ticket: Ticket, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()


async def _events(ticket: Ticket, form: Any, with_usage: bool) -> AsyncIterator[str]:
    num_tokens = 0
    try:
        for chunk in form.opening(len(ticket.jobs)):
            yield _event(chunk)
        async for piece in ticket.pieces():
            num_tokens += piece.num_tokens
            for chunk in form.chunks(piece):
                yield _event(chunk)
    except RequestError as error:  # the status is sent already: the error becomes the last event
        yield _event(error.body())
        return
    if with_usage:
        yield _event(form.usage_chunk(count_usage(_prompt_tokens(ticket), num_tokens)))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _prompt_tokens(ticket: Ticket) -> int:
    """Tokens of the different prompts; the choices of one prompt share it."""
    return sum({id(job.prompt): len(job.prompt) for job in ticket.jobs}.values())


async def _whole(request: Request, ticket: Ticket, form: Any) -> Response:
    async def collect() -> list[Piece]:
        return [piece async for piece in ticket.pieces()]

    collecting = asyncio.ensure_future(collect())
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=GONE)  # nobody sees it
        pieces = sorted(collecting.result(), key=lambda piece: piece.choice)
    finally:
        ticket.cancel()
        for task in (collecting, leaving):
            task.cancel()
    usage = count_usage(_prompt_tokens(ticket), sum(piece.num_tokens for piece in pieces))
    return JSONResponse(form.whole(pieces, usage))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

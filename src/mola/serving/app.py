"""The ASGI application: checks before a request is read, and the routes.

The routes are OpenAI's completions, chat completions and models, those that load and unload adapters, `/health` and
`/metrics`.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security.utils import get_authorization_scheme_param
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mola.serving.adapter_loading import AdapterLoader
from mola.serving.client_leaving import CLIENT_LEFT, ClientLeftError, unless_client_leaves
from mola.serving.decision_queue import DecisionQueue
from mola.serving.jobs import Job, JobMaker
from mola.serving.metrics import Metrics
from mola.serving.model_names import DECIDE
from mola.serving.request_queue import QueuedRequest, RequestQueue
from mola.serving.requests import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from mola.serving.responses import (
    ChatFormat,
    CompletionFormat,
    RequestError,
    add_error_handlers,
    skill_headers,
    skill_usage,
    unknown_model,
    usage_counts,
)
from mola.serving.skill_loading import SkillLoader
from mola.serving.stream_writer import AnswerPiece, TokenDecoder

logger = logging.getLogger(__name__)

_PATH_WITHOUT_TOKEN = "/health"
_MAX_LOGGED_PATH = 200  # characters


def build_app(
    jobs: JobMaker,
    queue: RequestQueue,
    loader: AdapterLoader | SkillLoader,
    decoder: TokenDecoder,
    metrics: Metrics,
    api_key: str | None,
    max_body_bytes: int,
) -> FastAPI:
    """The ASGI application; see `RequestMiddleware` for the last two arguments."""
    # No redirects: they would lead to the address that the client wrote as `Host`.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(RequestMiddleware, api_key=api_key, max_body_bytes=max_body_bytes, metrics=metrics)
    add_error_handlers(app)
    tokenizing = asyncio.Lock()
    decisions = DecisionQueue(queue.decide)

    async def make_jobs(body: ChatRequest | CompletionRequest) -> list[Job]:
        # Tokenizing a long prompt takes a while, so it runs on a different thread. Tokenizers keep state, so only one
        # request is tokenized at a time.
        async with tokenizing:
            made = await run_in_threadpool(jobs.make, body)
            # During the tokenizing a client may have replaced the adapter.
            while any(job.adapter != jobs.adapter(body.model) for job in made):
                made = await run_in_threadpool(jobs.make, body)
        if made[0].adapter != DECIDE:
            return made
        while True:
            decided = await decide(body, made)
            skill = decided[0].adapter
            if isinstance(body, CompletionRequest) or not jobs.chats.keys() & {skill, DECIDE}:
                return decided
            async with tokenizing:  # the skill writes chats in its own way
                own = await run_in_threadpool(jobs.make, body, skill)
            if jobs.has_skill(skill):
                return own

    async def decide(body: ChatRequest | CompletionRequest, made: list[Job]) -> list[Job]:
        """The jobs with the skills that are asked."""
        prompts = {id(job.prompt): job.prompt for job in made}  # several answers may share a prompt
        while True:
            found = await asyncio.gather(*map(decisions.decide, prompts.values()))
            if all(map(jobs.has_skill, found)):  # a client may have unloaded one meanwhile
                skills = dict(zip(prompts, found, strict=True))
                answering = [skills[id(job.prompt)] for job in made]
                return [
                    replace(job, adapter=skill, stops=jobs.stops(body, skill))
                    for job, skill in zip(made, answering, strict=True)
                ]

    async def answer(
        request: Request, body: ChatRequest | CompletionRequest, answer_format: ChatFormat | CompletionFormat
    ) -> Response:
        queue.check_room()
        queued = queue.submit(await make_jobs(body), body.model, is_streamed=bool(body.stream))
        metrics.prompt_tokens.inc(queued.num_prompt_tokens)
        if body.stream:
            return _EventStream(queued, answer_format, body.wants_usage(), jobs.has_skills)
        return await _answer_whole(request, queued, answer_format, jobs.has_skills)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(request, body, ChatFormat(body.model, decoder))

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, body, CompletionFormat(body.model, decoder))

    add_model_routes(app, jobs.adapters)
    add_loading_routes(app, loader)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        queue.check_alive()
        return {"status": "ok"} | queue.counts()

    return app


def add_model_routes(app: FastAPI, names: Collection[str]) -> None:
    """Add the routes that describe the models; `names` may change while the server runs."""
    start = int(time.time())

    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": start, "owned_by": "mola"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        if name not in names:
            raise unknown_model(name, names)
        return describe(name)


def add_loading_routes(app: FastAPI, loader: AdapterLoader | SkillLoader) -> None:
    """Add the routes that load and unload adapters or skills."""

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(body: LoadRequest) -> dict[str, str]:
        await loader.load(body.lora_name, body.lora_path, body.load_inplace)
        return {"status": "ok", "lora_name": body.lora_name}

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: UnloadRequest) -> dict[str, str]:
        await loader.unload(body.lora_name)
        return {"status": "ok", "lora_name": body.lora_name}


class _EventStream(StreamingResponse):
    """Server-sent events. When the stream ends or its client leaves, the request is cancelled."""

    def __init__(
        self, queued: QueuedRequest, answer_format: ChatFormat | CompletionFormat, with_usage: bool, has_skills: bool
    ) -> None:
        events = _write_events(queued, answer_format, with_usage, has_skills)
        headers = {"Cache-Control": "no-cache"} | (skill_headers(queued.skills) if has_skills else {})
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._queued = queued

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # runs even if the client left before the first event
            self._queued.cancel()


async def _write_events(
    queued: QueuedRequest, answer_format: ChatFormat | CompletionFormat, with_usage: bool, has_skills: bool
) -> AsyncIterator[str]:
    """Write the pieces of a request as server-sent events."""
    num_tokens = 0
    try:
        for chunk in answer_format.first_chunks(len(queued.jobs)):
            yield _event(chunk)
        async for piece in queued.pieces():
            num_tokens += piece.num_tokens
            for chunk in answer_format.chunks(piece):
                yield _event(chunk)
    except RequestError as error:  # the status was sent already, so the error is the last event
        yield _event(error.body())
        return
    if with_usage:
        yield _event(answer_format.usage_chunk(_usage(queued, num_tokens, has_skills)))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _usage(queued: QueuedRequest, num_tokens: int, has_skills: bool) -> dict[str, Any]:
    """Token counts of a request; with skills also who answered."""
    skills = skill_usage(queued.skills) if has_skills else {}
    return usage_counts(queued.num_prompt_tokens, num_tokens) | skills


async def _answer_whole(
    request: Request, queued: QueuedRequest, answer_format: ChatFormat | CompletionFormat, has_skills: bool
) -> Response:
    """The response with all answers of a request, or an empty one as soon as the client leaves."""

    async def collect() -> list[AnswerPiece]:
        return [piece async for piece in queued.pieces()]

    try:
        pieces = sorted(await unless_client_leaves(request, collect()), key=lambda piece: piece.choice)
    except ClientLeftError:
        return Response(status_code=CLIENT_LEFT)
    finally:
        queued.cancel()
    usage = _usage(queued, sum(piece.num_tokens for piece in pieces), has_skills)
    headers = skill_headers(queued.skills) if has_skills else None
    return JSONResponse(answer_format.whole(pieces, usage), headers=headers)


class RequestMiddleware:
    """Answers 401 if the token is missing or wrong and 413 if the body is too large; other requests reach `app`.

    Args:
        app: the application.
        api_key: token that clients must send; None if they need none.
        max_body_bytes: size of the largest body.
        metrics: counts the responses.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, metrics: Metrics) -> None:
        self._app, self._api_key, self._max_body_bytes, self._metrics = app, api_key, max_body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status = 500  # Starlette answers exceptions outside of this middleware

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        error = self._find_error(scope["path"], Headers(scope=scope))
        app = self._app if error is None else error.response()
        try:
            await app(scope, self._limit_body(receive), send_and_note_status)
        finally:
            self._metrics.responses.labels(str(status)).inc()
            # The query and the headers may hold a token, so the log has neither. A path may hold line breaks.
            path = quote(scope["path"][:_MAX_LOGGED_PATH])
            logger.info("%s %s %d %.2f s", scope["method"], path, status, time.monotonic() - start)

    def _find_error(self, path: str, headers: Headers) -> RequestError | None:
        """None if the request may reach the application, else the error that answers it."""
        if self._api_key is not None and path != _PATH_WITHOUT_TOKEN and not self._has_token(headers, self._api_key):
            return RequestError(
                401,
                "this server needs its token, and the request has no token or a wrong one. Send the header "
                "`Authorization: Bearer TOKEN`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            return self._body_too_large()
        return None

    def _has_token(self, headers: Headers, api_key: str) -> bool:
        scheme, token = get_authorization_scheme_param(headers.get("authorization"))
        is_correct = secrets.compare_digest(token.encode(), api_key.encode())  # in constant time
        return is_correct and scheme.lower() == "bearer"

    def _limit_body(self, receive: Receive) -> Receive:
        """Wrap `receive` so that it raises when a body exceeds the limit.

        A chunked body declares no length, so the bytes are counted as they arrive.
        """
        size = 0

        async def receive_and_count() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise self._body_too_large()
            return message

        return receive_and_count

    def _body_too_large(self) -> RequestError:
        return RequestError(413, f"the body must have at most {self._max_body_bytes} bytes. Send less.")

"""A proxy in front of a server with OpenAI's interface that has the LoRAs of a skills folder under their names.

A request for the name of the whole folder is decided here, and forwarded under the name of the skill that answers it or
of the base model.

The routes are those of mola's own server, and there are no others. A client's path never goes to the server behind,
which would let anybody load any folder: each request to it has a path that stands here.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2.exceptions import TemplateError
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from mola.errors import MolaError
from mola.generation import predicting
from mola.models.base_model import max_positions
from mola.serving.app import RequestMiddleware, add_loading_routes, add_model_routes
from mola.serving.client_leaving import CLIENT_LEFT, ClientLeftError, unless_client_leaves
from mola.serving.decision_queue import DecisionQueue
from mola.serving.jobs import check_unicode
from mola.serving.metrics import Metrics
from mola.serving.model_names import DECIDE, name_behind
from mola.serving.responses import RequestError, add_error_handlers, skill_headers, skill_usage, unknown_model
from mola.serving.skill_loading import SkillLoader
from mola.tuner.skills.decision import SkillStatistics

# These headers belong to one connection, or to a body that this proxy may change.
_OWN_HEADERS = ("host", "connection", "content-length", "transfer-encoding", "accept-encoding", "date", "server")


class SkillsProxy:
    """Decides and forwards; `app` is the ASGI application.

    Args:
        upstream: client of the server behind: its base URL, and the token if the server needs one.
        names: name in requests -> name of the skill, None for the base model, or `DECIDE`.
        names_behind: name of the skill, or None for the base model -> its name in the server behind.
        model: a model with skills, of which only the layers below the decision are used.
        tokenizer: the base model's tokenizer.
    """

    def __init__(
        self,
        upstream: httpx.AsyncClient,
        names: Mapping[str, str | None],
        names_behind: Mapping[str | None, str],
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._upstream, self.names, self._names_behind = upstream, dict(names), dict(names_behind)
        self._skills, self._tokenizer = model.skills, tokenizer
        self._max_positions, self._num_embeddings = max_positions(model.config), predicting.num_embeddings(model)
        self._metrics = Metrics()
        self._thread = ThreadPoolExecutor(1, "mola-decide")  # only this thread uses the model and the tokenizer
        self._decisions = DecisionQueue(self._decide_together)

    def app(self, loader: SkillLoader, api_key: str | None, max_body_bytes: int) -> FastAPI:
        """The ASGI application; see `RequestMiddleware` for the last two arguments."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=self._lifespan)
        app.add_middleware(RequestMiddleware, api_key=api_key, max_body_bytes=max_body_bytes, metrics=self._metrics)
        add_error_handlers(app)
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.post(path)(partial(self._answer, path))
        add_model_routes(app, self.names)
        add_loading_routes(app, loader)
        app.get("/metrics")(self._show_metrics)
        app.get("/health")(self._show_health)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await self._upstream.aclose()

    async def _answer(self, path: str, request: Request) -> Response:
        """Forward a request for an answer to the skill that answers it."""
        body = await _read_object(request)
        name = body.get("model")
        if not isinstance(name, str) or name not in self.names:
            raise unknown_model(str(name), self.names)
        skill = self.names[name]
        try:
            if skill == DECIDE:
                prompt = await self._run(lambda: self._prompt(body))
                skill = await unless_client_leaves(request, self._decide(prompt))
            body["model"] = self._names_behind[skill]
            answer = await unless_client_leaves(request, self._send(path, request, json.dumps(body).encode()))
            if answer.status_code != 200:
                return _Stream(answer)
            self._metrics.count_answers([skill])
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                return _Stream(answer, lambda line: _named_event(line, name, skill), skill_headers([skill]))
            whole = await unless_client_leaves(request, _read_whole(answer))
        except ClientLeftError:
            return Response(status_code=CLIENT_LEFT)
        _set_names(whole, name, skill)
        return JSONResponse(whole, headers=skill_headers([skill]))

    async def _decide(self, prompt: list[int]) -> str | None:
        if self._max_positions is not None and len(prompt) > self._max_positions:
            return None  # the server behind refuses the prompt
        skill = await self._decisions.decide(prompt)
        while skill is not None and skill not in self.names:  # a client has unloaded it meanwhile
            skill = await self._decisions.decide(prompt)
        return skill

    async def _decide_together(self, prompts: list[Sequence[int]]) -> Sequence[str | None]:
        if not self._skills.asked:
            return [None] * len(prompts)
        decisions = await self._run(lambda: self._skills.decide(prompts))
        return list(decisions.names)

    async def _run(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _prompt(self, body: Mapping[str, Any]) -> list[int]:
        """Token ids of the prompt of a request, as the server behind will read it."""
        if "messages" in body:
            return self._chat_prompt(body)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            check_unicode([prompt])
            return predicting.encode_prompts(self._tokenizer, [prompt])[0]
        if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
            predicting.check_token_ids(self._num_embeddings, [prompt])
            return prompt
        raise RequestError(
            400,
            "`prompt` must be one text, or the token ids of one, where the skill is decided. Send several requests, "
            "or name the skill as `model`.",
            param="prompt",
        )

    def _chat_prompt(self, body: Mapping[str, Any]) -> list[int]:
        try:
            messages = [{**message, "content": _text_of(message.get("content"))} for message in body["messages"]]
            check_unicode(message["content"] for message in messages)
            text = self._tokenizer.apply_chat_template(
                messages, tools=body.get("tools"), add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                400, f"`messages` cannot be written with the base model's chat template: {error}", param="messages"
            ) from None
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise MolaError("`messages` must hold at least one token: got none. Write some text.")
        return ids

    async def add_skill(self, name: str, folder: str, statistics: SkillStatistics) -> None:
        """Add a skill to the server behind, and to those that are decided."""
        behind = await run_in_threadpool(name_behind, name, folder)
        await self._tell("load_lora_adapter", {"lora_name": behind, "lora_path": folder})
        try:
            await self._run(lambda: self._skills.add(name, folder, statistics))
        except MolaError:
            await self._tell("unload_lora_adapter", {"lora_name": behind})
            raise
        self._names_behind[name] = behind

    async def remove_skill(self, name: str) -> None:
        """Remove a skill from those that are decided, and from the server behind, whose running answers keep it."""
        await self._run(lambda: self._skills.remove(name))
        await self._tell("unload_lora_adapter", {"lora_name": self._names_behind.pop(name)})

    async def _tell(self, route: str, body: Mapping[str, Any]) -> None:
        answer = await self._upstream.post(f"/v1/{route}", json=body)
        if answer.status_code != 200:
            raise RequestError(answer.status_code, f"{route} failed in the server behind: {answer.text}")

    async def _show_metrics(self, request: Request) -> Response:
        """The metrics of the server behind, and those of the decisions."""
        answer = await self._send("/metrics", request)
        text = await answer.aread()
        await answer.aclose()
        return Response(text + self._metrics.text(), answer.status_code, media_type=answer.headers["content-type"])

    async def _show_health(self, request: Request) -> Response:
        return _Stream(await self._send("/health", request))

    async def _send(self, path: str, request: Request, content: bytes = b"") -> httpx.Response:
        """Send a client's request to the server behind, with another path and body; returns before the body arrives."""
        headers = {name: value for name, value in request.headers.items() if name not in _OWN_HEADERS}
        forwarded = self._upstream.build_request(request.method, path, headers=headers, content=content)
        try:
            return await self._upstream.send(forwarded, stream=True)
        except httpx.TransportError as error:
            raise RequestError(502, f"the server behind does not answer: {error}. Its log says why.") from None


class _Stream(StreamingResponse):
    """The response of the server behind as it arrives; its connection closes when this response ends.

    Args:
        answer: the response.
        change: changes each line; None to pass bytes on unchanged.
        headers: further headers.
    """

    def __init__(
        self,
        answer: httpx.Response,
        change: Callable[[str], str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        kept = {name: value for name, value in answer.headers.items() if name not in _OWN_HEADERS}
        super().__init__(_pieces(answer, change), answer.status_code, {**kept, **(headers or {})})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


async def _pieces(answer: httpx.Response, change: Callable[[str], str] | None) -> AsyncIterator[str | bytes]:
    if change is None:
        async for piece in answer.aiter_raw():
            yield piece
        return
    async for line in answer.aiter_lines():
        yield f"{change(line)}\n"


async def _read_object(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError:
        raise RequestError(400, "the body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object.")
    return body


async def _read_whole(answer: httpx.Response) -> dict[str, Any]:
    try:
        return dict(json.loads(await answer.aread()))
    finally:
        await answer.aclose()


def _text_of(content: Any) -> str:
    """The text of a message, whose content may be a list of parts; images and the like are left out."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _named_event(line: str, name: str, skill: str | None) -> str:
    """A line of server-sent events with the names that a client knows."""
    if not line.startswith("data: {"):
        return line
    chunk = json.loads(line.removeprefix("data: "))
    _set_names(chunk, name, skill)
    return f"data: {json.dumps(chunk, separators=(',', ':'))}"


def _set_names(answer: dict[str, Any], name: str, skill: str | None) -> None:
    """Put the name that was asked into an answer, and the skill beside its token counts."""
    if "model" in answer:
        answer["model"] = name
    if isinstance(answer.get("usage"), dict):
        answer["usage"] |= skill_usage([skill])

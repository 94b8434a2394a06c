"""Bodies of requests to the server, up to where a job is made of them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.checking import fuzz, survives
from tests.fuzz.documents import files

pytest.importorskip("fastapi")
from fastapi import FastAPI
from fastapi.testclient import TestClient

from mola.serving.errors import add_handlers
from mola.serving.requests import ChatRequest, CompletionRequest

BOTH = {"model": "m", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 1, "n": 1, "stop": ["x"]}
BOTH |= {"stream": True, "stream_options": {"include_usage": True}, "user": "me", "logit_bias": {}}
PARTS = [{"type": "text", "text": "x"}]
CHAT = BOTH | {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": PARTS}]}
CHAT |= {"tools": [], "response_format": {"type": "text"}, "max_completion_tokens": 3}
COMPLETION = BOTH | {"prompt": ["Hello", ""], "echo": False, "suffix": ""}


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    add_handlers(app)

    @app.post("/chat")
    async def chat(body: ChatRequest):
        body.stops(), body.new_tokens(), body.wants_usage()
        return [message.plain() for message in body.messages]

    @app.post("/completion")
    async def completion(body: CompletionRequest):
        return [body.prompts(), body.stops(), body.new_tokens(), body.wants_usage()]

    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize(("path", "document"), [("/chat", CHAT), ("/completion", COMPLETION)])
@fuzz
@given(data=st.data())
def test_body(client, path, document, data):
    content = data.draw(files(document))
    answer = survives(client.post, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        error = json.loads(answer.content)["error"]
        assert error["message"]
        assert len(error["message"]) < 2000


MANY = {
    "prompts": ("/completion", {"prompt": [1] * 330_000}),
    "stops": ("/completion", {"prompt": "x", "stop": [1] * 330_000}),
    "fields": ("/completion", {"prompt": "x"} | {f"k{number}": 1 for number in range(80_000)}),
    "messages": ("/chat", {"messages": [{}] * 240_000}),
    "parts": ("/chat", {"messages": [{"role": "user", "content": [{}] * 240_000}]}),
}


@pytest.mark.parametrize(("path", "fields"), MANY.values(), ids=MANY)
def test_a_million_bytes_of_wrong_values_cost_little(client, path, fields):
    content = json.dumps({"model": "m"} | fields)
    assert 900_000 < len(content) < 1 << 20
    answer = survives(client.post, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert len(answer.content) < 1000

"""One server for all: answers, limits and errors over real connections."""

import asyncio
import functools
import json
import logging
import re

import pytest
from transformers import LlamaForCausalLM

pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")
openai = pytest.importorskip("openai", reason="needs the extra `test`")

from mola.serving.serve import ServeOptions, running_server  # noqa: E402

from ..waiting import PATIENCE, wait_until  # noqa: E402
from .conftest import NEW_TOKENS  # noqa: E402

MODELS = ["tiny-chat", "first", "v2.0"]
TOKEN = "a-secret-token"
Client, get, post = (functools.partial(each, timeout=PATIENCE) for each in (httpx.Client, httpx.get, httpx.post))
PROMPTS = [f"Question {number}: what comes next?" for number in range(5)]


@pytest.fixture(scope="module")
def url(chat_model_dir, adapters):
    options = ServeOptions(
        base_model=str(chat_model_dir),
        adapter=[f"{name}={folder}" for name, folder in adapters.items()],
        port=0,
        api_key=TOKEN,
        max_tokens=900,
        max_choices=4,
        max_waiting=100,
        max_body_bytes=20_000,
        dtype="float32",
        device="cpu",
    )
    with running_server(options) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url):
    with Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        yield http


def complete(client, model="first", prompt=PROMPTS[0], max_tokens=NEW_TOKENS, **arguments):
    return client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, **arguments)


def streamed(chunks):
    """Text of each choice, and why it ended."""
    texts, reasons = {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in reasons
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts.keys() == reasons.keys()
    return [texts[index] for index in sorted(texts)], reasons


@pytest.fixture
def alive(url, client, offline):
    """After the test the server still answers, and nothing is left in it."""
    yield
    assert complete(client).choices[0].text == offline("first", PROMPTS[0])
    wait_until_idle(url)


def wait_until_idle(url):
    wait_until(lambda: get(f"{url}/health").json() == {"status": "ok", "running": 0, "waiting": 0})


def test_models_are_the_base_and_every_adapter(client, url):
    assert [model.id for model in client.models.list()] == MODELS
    assert client.models.retrieve("v2.0").id == "v2.0"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_generate(model, client, offline):
    expected = offline(model, PROMPTS[0])
    whole = complete(client, model)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.model == model
    prompt_tokens = len(PROMPTS[0]) + 1
    assert whole.usage.to_dict() == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": NEW_TOKENS,
        "total_tokens": prompt_tokens + NEW_TOKENS,
    }
    assert streamed(complete(client, model, stream=True)) == ([expected], {0: "length"})
    others = {offline(other, PROMPTS[0]) for other in MODELS}
    assert len(others) == 3


def test_chat_uses_the_template(client, offline):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
    ]
    # The template writes a begin token, to which the server must not add another; `generate` adds one to plain text.
    text = "<system>Be brief.<user>Hi<assistant>"
    arguments = {"model": "first", "messages": messages, "max_completion_tokens": NEW_TOKENS}
    whole = client.chat.completions.create(**arguments)
    assert whole.usage.prompt_tokens == 1 + len(text)
    assert whole.choices[0].message.content == offline("first", text)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == ([whole.choices[0].message.content], {0: "length"})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_hundred_streams_at_once_are_each_the_answer_of_generate(url, offline):
    async def one(client, number):
        model, prompt = MODELS[number % 3], PROMPTS[number % 5]
        stream = await client.completions.create(model=model, prompt=prompt, max_tokens=NEW_TOKENS, stream=True)
        return streamed([chunk async for chunk in stream])[0][0]

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(100)))

    expected = [offline(MODELS[number % 3], PROMPTS[number % 5]) for number in range(100)]
    assert asyncio.run(all_of_them()) == expected


def test_sampling_is_that_of_generate_with_the_same_seed(client, offline):
    for values in ({"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.7}, {"top_p": 0.9}):
        texts = [complete(client, seed=seed, **values).choices[0].text for seed in (7, 8)]
        assert texts == [offline("first", PROMPTS[0], seed=seed, **values) for seed in (7, 8)]
        assert texts[0] != texts[1]
    top_k = complete(client, seed=7, temperature=9.0, extra_body={"top_k": 1})
    assert top_k.choices[0].text == offline("first", PROMPTS[0])


def test_without_seed_every_sampled_answer_is_another(client):
    assert len({complete(client, temperature=1.5, max_tokens=12).choices[0].text for _ in range(3)}) > 1


def test_temperature_zero_is_greedy(client, offline):
    assert complete(client, temperature=0, seed=3, top_p=0.5).choices[0].text == offline("first", PROMPTS[0])


@pytest.mark.parametrize("stream", [False, True])
def test_n_and_several_prompts_are_numbered_choices(stream, client, offline):
    result = complete(client, prompt=PROMPTS[:2], n=2, temperature=1.5, seed=5, stream=stream)
    expected = [
        offline("first", prompt, temperature=1.5, seed=seed)
        for prompt, seed in zip([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, range(5, 9), strict=True)
    ]
    if stream:
        assert streamed(result)[0] == expected
    else:
        assert [choice.text for choice in result.choices] == expected
        assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
        assert result.usage.prompt_tokens == sum(len(prompt) + 1 for prompt in PROMPTS[:2])
        assert result.usage.completion_tokens == 4 * NEW_TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_before_its_text(stream, client, offline):
    text = offline("first", PROMPTS[0], max_new_tokens=40)
    stop = text[10:13]
    result = complete(client, max_tokens=40, stop=["never there", stop], stream=stream)
    texts, reasons = streamed(result) if stream else ([result.choices[0].text], {0: result.choices[0].finish_reason})
    assert texts == [text[: text.index(stop)]]
    assert reasons == {0: "stop"}


def test_a_special_token_can_be_a_stop(client, tiny_tokenizer):
    with pytest.raises(openai.BadRequestError, match="special token '</s>'"):
        complete(client, stop="x</s>")
    assert complete(client, stop="</s>").choices[0].text


WRONG = {
    "temperature nan": ({"temperature": float("nan")}, "`temperature`"),
    "top_p": ({"top_p": 0}, "`top_p`.*0"),
    "top_k": ({"top_k": 0}, "`top_k`"),
    "max_tokens limit": ({"max_tokens": 901}, "at most 900.*901"),
    "n": ({"n": 5}, "at most 4.*5"),
    "many prompts": ({"prompt": ["a"] * 3, "n": 2}, "at most 4.*6"),
    "stop": ({"stop": [""]}, "`stop`"),
    "long stop": ({"stop": ["x", "a" * 501]}, "`stop`.*500.*501"),
    "stops": ({"stop": ["a"] * 5}, "`stop`.*5"),
    "logprobs": ({"logprobs": 21}, "`logprobs`.*20"),
    "echo": ({"echo": True}, "`echo`"),
    "penalty": ({"frequency_penalty": 2.5}, "`frequency_penalty`.*2"),
    "bias": ({"logit_bias": {"5": 1}}, "`logit_bias`"),
    "unknown field": ({"min_p": 0.1}, "`min_p`"),
    "half a surrogate pair": ({"prompt": "\ud800"}, "not valid Unicode"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "`stream_options` needs"),
    "long prompt": ({"prompt": "x" * 2000}, "1024 positions.*2001 tokens"),
    "no room": ({"prompt": "x" * 1000, "max_tokens": 24}, "1024 positions.*1001 tokens.*24"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_wrong_fields_are_refused_by_name(fields, message, http):
    body = {"model": "first", "prompt": "x", "max_tokens": 2} | fields
    response = http.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "`messages.0.content"),
        ({"tools": [{"type": "function"}]}, "`tools`"),
        ({"logprobs": 2}, "`logprobs`"),
        ({"top_logprobs": 2}, "`top_logprobs` needs `logprobs`"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "3 and .* 4 disagree"),
    ],
)
def test_wrong_chats_are_refused(fields, message, http):
    body = {"model": "first", "messages": [{"role": "user", "content": "x"}]} | fields
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert re.search(message, response.json()["error"]["message"]), response.text


def test_unsupported_fields_with_harmless_values_pass(client, offline):
    result = complete(
        client, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, echo=False, user="somebody", n=1
    )
    assert result.choices[0].text == offline("first", PROMPTS[0])


def test_null_and_false_fields_pass(http):
    body = {"model": "first", "max_tokens": 2, "reasoning_effort": None, "service_tier": None, "store": False}
    assert http.post("/v1/completions", json={**body, "prompt": "x"}).status_code == 200
    said = {"role": "assistant", "content": "y", "refusal": None, "tool_calls": None}  # as an answer is sent back
    messages = [{"role": "user", "content": "x"}, said, {"role": "user", "content": "z"}]
    assert http.post("/v1/chat/completions", json={**body, "messages": messages}).status_code == 200


@pytest.mark.parametrize("content", [b'{"model": ', b"[1]", b"\xff\xfe", b"[" * 15_000])
def test_malformed_bodies(content, http, alive):
    response = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_other_content_types_are_refused(http):
    response = http.post("/v1/completions", data={"model": "first"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("chunks", [None, [50_000] * 4, [20_001], [20_000, 1]])
def test_too_large_bodies(chunks, http, alive):
    content = b"x" * 200_000 if chunks is None else iter([b"x" * size for size in chunks])
    response = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert "at most 20000 bytes" in response.json()["error"]["message"]


def test_unknown_models_paths_and_methods(client, http, alive):
    with pytest.raises(
        openai.NotFoundError, match="'gpt-4' does not exist here. The models are tiny-chat, first, v2.0"
    ):
        complete(client, "gpt-4")
    assert http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    response = http.get("/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"


WRONG_TOKENS = [None, TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"BEARER {TOKEN.upper()}", "Bearer \xe9"]


@pytest.mark.parametrize("header", WRONG_TOKENS)
def test_wrong_tokens(header, url, alive):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for response in (
        get(f"{url}/v1/models", headers=headers),
        post(f"{url}/v1/completions", headers=headers, json={"model": "first", "prompt": "x"}),
        get(f"{url}/other", headers=headers),
    ):
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert get(f"{url}/health", headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stops_when_the_client_leaves(stream, url, http, alive, monkeypatch):
    forward, steps = LlamaForCausalLM.forward, []

    @functools.wraps(forward)
    def counting(*arguments, **options):
        steps.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    body = {"model": "first", "prompt": "x", "max_tokens": 900, "stream": stream}
    if stream:
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # keep a reference: httpx closes a connection without one
            next(lines)
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=httpx.Timeout(PATIENCE, read=0.1))
    wait_until_idle(url)
    assert len(steps) < 450


@pytest.mark.parametrize("path", ["//health", "/health/", "/health;/v1/models", "/HEALTH", "/health%00"])
def test_only_the_path_health_needs_no_token(path, url):
    assert get(f"{url}{path}").status_code == 401


@pytest.mark.parametrize(
    "name", ["../../../../etc/passwd", "..", "", "first/../first", "first\0", "served0", "a" * 10_000]
)
def test_model_names_are_not_paths(name, http):
    response = http.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 2})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert len(response.content) < 1000


def test_no_redirect_leads_to_the_host_that_a_client_names(http):
    response = http.post("/v1/completions/", json={}, headers={"Host": "elsewhere.example"})
    assert response.status_code == 404
    assert "elsewhere" not in response.text


SECRET = "my-secret-prompt"
PRIVATE = {
    "an object as prompt": {"prompt": {"text": SECRET}},
    "a list in a prompt": {"prompt": ["x", [SECRET]]},
    "an unknown field": {"prompt": "x", "other": SECRET},
    "half a surrogate pair": {"prompt": SECRET + "\ud800"},
    "a prompt that is too long": {"prompt": SECRET * 1000},
    "an unknown part": {"messages": [{"role": "user", "content": [{"txt": SECRET}]}]},
    "no list": {"messages": SECRET},
    "another field of a message": {"messages": [{"role": "user", "content": "x", "name": SECRET}]},
}


@pytest.mark.parametrize("fields", PRIVATE.values(), ids=PRIVATE)
def test_errors_do_not_repeat_prompts(fields, http, caplog):
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    content = json.dumps({"model": "first"} | fields)
    with caplog.at_level(logging.DEBUG):
        response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert SECRET not in response.text
    assert SECRET not in "".join(messages(caplog, "mola") + messages(caplog, "uvicorn"))


def test_log_has_one_line_per_request_and_no_token(http, caplog):
    with caplog.at_level(logging.DEBUG):
        # Lines are written after answers are sent: the last line of a test before may still be on its way.
        http.get("/first")
        wait_until(lambda: any(line.startswith("GET /first") for line in log_lines(caplog)))
        caplog.clear()
        http.get(f"/v1/models?api_key={TOKEN}")
        http.get("/a%0Ab")
        wait_until(lambda: len(log_lines(caplog)) >= 2)
    lines = log_lines(caplog)
    assert lines[0].startswith("GET /v1/models 200")
    assert lines[1].startswith("GET /a%0Ab 404")
    assert TOKEN not in "".join(messages(caplog, "mola") + messages(caplog, "uvicorn") + messages(caplog, "asyncio"))


def messages(caplog, logger):
    return [record.getMessage() for record in caplog.records if record.name.startswith(logger)]


def log_lines(caplog):
    return [line for line in messages(caplog, "mola.serving.app") if "/health" not in line]

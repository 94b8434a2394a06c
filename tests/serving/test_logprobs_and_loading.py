"""Log-probabilities, penalties, metrics, and adapters that are loaded and unloaded while the server runs."""

import asyncio
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM

pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")
openai = pytest.importorskip("openai", reason="needs the extra `test`")

from mola.errors import MolaError  # noqa: E402
from mola.serving.jobs import JobMaker  # noqa: E402
from mola.serving.serve import ServeOptions, running_server  # noqa: E402

from ..damage import change_tensors  # noqa: E402
from ..waiting import PATIENCE, wait_until  # noqa: E402
from .conftest import NEW_TOKENS, save_adapter  # noqa: E402

TOKEN = "a-secret-token"
PROMPT = "Question 0: what comes next?"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def root(tiny_model_dir, chat_model_dir, tmp_path_factory):
    """Adapters that may be loaded, some that may not, and a link that leads out of the folder."""
    root = tmp_path_factory.mktemp("root")
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny_model_dir, root / "trained" / name, 10 + seed)
    others = {
        "broken": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        "virtual": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    for name, config in others.items():
        get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model_dir), config).save_pretrained(root / name)
    change_tensors(root / "broken", lambda tensors: tensors.pop(sorted(tensors)[0]))
    (root / "empty").mkdir()
    (root / "out").symlink_to(root.parent, target_is_directory=True)
    return root


@pytest.fixture(scope="module", params=[4, pytest.param(1, marks=pytest.mark.slow)], ids=["batch", "single"])
def url(request, chat_model_dir, root):
    options = ServeOptions(
        base_model=str(chat_model_dir),
        adapter_root=str(root),
        port=0,
        api_key=TOKEN,
        dtype="float32",
        device="cpu",
        max_batch_size=request.param,
    )
    with running_server(options) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE) as http:
        yield http


def complete(client, model="tiny-chat", **values):
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=NEW_TOKENS, **values)


def load(http, name, path, **values):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **values})


def unload(http, name):
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


@pytest.fixture
def loaded(http):
    """Two adapters, which are gone after the test."""
    for name in ("one", "two"):
        assert load(http, name, f"trained/{name}").status_code == 200
    yield
    for name in ("one", "two"):
        assert unload(http, name).status_code in (200, 404)


def test_logprobs_of_a_chat(client):
    arguments = {"model": "tiny-chat", "messages": MESSAGES, "max_tokens": NEW_TOKENS, "logprobs": True}
    whole = client.chat.completions.create(**arguments, top_logprobs=3).choices[0]
    assert len(whole.logprobs.content) == NEW_TOKENS
    for token in whole.logprobs.content:
        assert len(token.top_logprobs) == 3
        values = [each.logprob for each in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob == values[0] <= 0  # greedy
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    plain = client.chat.completions.create(**arguments).choices[0].logprobs.content
    assert [token.top_logprobs for token in plain] == [[]] * NEW_TOKENS
    chunks = client.chat.completions.create(**arguments, top_logprobs=3, stream=True)
    streamed = [token for chunk in chunks if (given := chunk.choices[0].logprobs) for token in given.content]
    assert [token.token for token in streamed] == [token.token for token in whole.logprobs.content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in whole.logprobs.content])


def test_logprobs_of_a_completion(client):
    whole = complete(client, logprobs=2).choices[0]
    logprobs = whole.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == NEW_TOKENS
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == value == max(top.values())
        assert math.exp(value) > 1 / 300
    assert complete(client).choices[0].logprobs is None
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs == [{}] * NEW_TOKENS


def test_penalties_change_answers(client):
    def tokens(values):
        arguments = {"max_tokens": 40, "model": "tiny-chat", "prompt": PROMPT, "logprobs": 0}
        return client.completions.create(**arguments, **values).choices[0].logprobs.tokens

    penalties = [{name: value} for name in ("presence_penalty", "frequency_penalty") for value in (2.0, -2.0, 0.0)]
    with ThreadPoolExecutor() as pool:
        usual, *others = pool.map(tokens, [{}, *penalties])
    assert len(set(usual)) < 40
    for penalised, rewarded, neither in (others[:3], others[3:]):
        assert len(set(penalised)) > len(set(usual)) > len(set(rewarded))
        assert neither == usual


def test_metrics_count(client, http, url):
    def value(name):
        found = re.search(rf"^{re.escape(name)} (\S+)$", http.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    tokens, prompts = value("mola_generated_tokens_total"), value("mola_prompt_tokens_total")
    first = value("mola_time_to_first_token_seconds_count")
    complete(client, n=2)
    assert value("mola_generated_tokens_total") == tokens + 2 * NEW_TOKENS
    assert value("mola_prompt_tokens_total") == prompts + len(PROMPT) + 1
    assert value("mola_time_to_first_token_seconds_count") == first + 2
    # Counted after the answer is sent.
    wait_until(lambda: value('mola_requests_total{model="tiny-chat",outcome="finished"}') >= 1)
    assert value('mola_responses_total{status="200"}') >= 1
    wait_until(lambda: value("mola_batch_size") == value("mola_requests_running") == 0)
    assert value("mola_requests_waiting") == 0
    assert httpx.get(f"{url}/metrics", timeout=PATIENCE).status_code == 401


def test_metrics_count_internal_errors(http, monkeypatch):
    def fail(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(JobMaker, "_encode", fail)
    body = {"model": "tiny-chat", "prompt": PROMPT}
    assert http.post("/v1/completions", json=body).status_code == 500
    wait_until(lambda: 'mola_responses_total{status="500"} 1' in http.get("/metrics").text)
    assert 'status="0"' not in http.get("/metrics").text


def test_adapters_are_loaded_replaced_and_unloaded(client, http, loaded):
    answers = {name: complete(client, name).choices[0].text for name in ("tiny-chat", "one", "two")}
    assert len(set(answers.values())) == 3
    assert [model.id for model in client.models.list()] == ["tiny-chat", "one", "two"]
    assert "'one' is taken" in load(http, "one", "trained/two").json()["error"]["message"]
    assert load(http, "one", "trained/two", load_inplace=True).status_code == 200
    assert complete(client, "one").choices[0].text == answers["two"]
    assert unload(http, "two").status_code == 200
    with pytest.raises(openai.NotFoundError):
        complete(client, "two")
    assert unload(http, "two").status_code == 404
    for name in ("tiny-chat", "one"):
        assert complete(client, name).choices[0].text == answers[{"one": "two"}.get(name, name)]


def test_running_answers_keep_their_adapter(url, http, loaded):
    async def visit():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
            stream = await client.completions.create(model="one", prompt=PROMPT, max_tokens=80, stream=True)
            texts, removing = [], None
            async for chunk in stream:
                texts.append(chunk.choices[0].text)
                removing = removing or asyncio.create_task(asyncio.to_thread(unload, http, "one"))
                assert len(texts) != 40 or not removing.done()  # the unloading waits for this answer
            assert len(texts) > 40
            assert (await removing).status_code == 200
            return "".join(texts)

    before = http.post("/v1/completions", json={"model": "one", "prompt": PROMPT, "max_tokens": 80}).json()
    assert asyncio.run(visit()) == before["choices"][0]["text"]
    assert http.get("/v1/models/one").status_code == 404


def test_loading_other_adapters_does_not_change_running_answers(url, http, loaded):
    def answer():
        body = {"model": "one", "prompt": PROMPT, "max_tokens": 20}
        return http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    async def visit():
        answering = [asyncio.create_task(asyncio.to_thread(answer)) for _ in range(2)]
        while not all(each.done() for each in answering):
            await asyncio.to_thread(unload, http, "two")
            assert (await asyncio.to_thread(load, http, "two", "trained/two")).status_code == 200
        return [await each for each in answering]

    expected = answer()
    assert asyncio.run(visit()) == [expected] * 2


WRONG = {
    "outside": ("../one", "below"),
    "a link that leads out": ("out", "below"),
    "absolute": ("/", "below"),
    "the root": (".", "below"),
    "null": ("a\0b", "below"),
    "missing": ("nothing", "no such folder"),
    "no adapter": ("empty", "adapter_config.json"),
    "a tensor is missing": ("broken", "1 tensors missing"),
    "virtual tokens": ("virtual", "before the prompt"),
}


@pytest.mark.parametrize(("path", "message"), WRONG.values(), ids=WRONG)
def test_wrong_folders_are_refused(path, message, client, http):
    before = complete(client).choices[0].text
    answer = load(http, "new", path)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert complete(client).choices[0].text == before


def test_the_base_model_stays(http):
    assert "base model" in unload(http, "tiny-chat").json()["error"]["message"]
    assert "base model" in load(http, "tiny-chat", "trained/one", load_inplace=True).json()["error"]["message"]


def test_loading_is_off_unless_asked_for_and_needs_a_token(chat_model_dir, root):
    options = ServeOptions(base_model=str(chat_model_dir), port=0, dtype="float32", device="cpu")
    with running_server(options) as url:
        for path, body in (("load", {"lora_name": "a", "lora_path": "one"}), ("unload", {"lora_name": "a"})):
            answer = httpx.post(f"{url}/v1/{path}_lora_adapter", json=body, timeout=PATIENCE)
            assert answer.status_code == 403
            assert "--adapter_root" in answer.json()["error"]["message"]
    options.adapter_root = str(root)
    with pytest.raises(MolaError, match="needs a token"), running_server(options):
        pass

"""Adapters of different kinds in one server: every answer is that of `generate`, or the adapter is refused."""

import concurrent.futures
import contextlib
import functools
import json
import shutil
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")

from mola import MolaConfig  # noqa: E402
from mola.errors import MolaError  # noqa: E402
from mola.generation.decoding import generate_text  # noqa: E402
from mola.models.adapters import changes_base  # noqa: E402
from mola.models.loading import load_model  # noqa: E402
from mola.models.tokenizer import load_tokenizer  # noqa: E402
from mola.serving.demonstration.demo import DemoOptions, running_demo  # noqa: E402
from mola.serving.request_queue import RequestQueue, _AnswerListener  # noqa: E402
from mola.serving.serve import ServeOptions, running_server  # noqa: E402

from ..grids import slow  # noqa: E402
from ..waiting import PATIENCE, wait_until  # noqa: E402

# PEFT before 0.19 says so where not every adapter has trained the same modules.
pytestmark = pytest.mark.filterwarnings("ignore:The model contains some adapter layers that are enabled")
TOKEN = "a-secret-token"
PROMPTS = ["What is it?", "Once upon a time"]
LINEARS = ["q_proj", "v_proj"]


def mixture(**settings):
    return MolaConfig(num_experts=2, top_k=2, r=2, target_modules=LINEARS, task_type="CAUSAL_LM", **settings)


def lora(**settings):
    return LoraConfig(r=2, target_modules=LINEARS, task_type="CAUSAL_LM", **settings)


def trained(base, folder, config, seed):
    """An adapter whose every tensor is somewhere else than at its start."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tied_dir(endless_model_dir, tmp_path_factory):
    """The endless model whose head is its embeddings."""
    folder = tmp_path_factory.mktemp("tied") / "tied"
    model = LlamaForCausalLM.from_pretrained(endless_model_dir)
    config = model.config
    config.tie_word_embeddings = True
    tied = LlamaForCausalLM(config)
    tied.load_state_dict(model.state_dict() | {"lm_head.weight": model.state_dict()["model.embed_tokens.weight"]})
    tied.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(endless_model_dir).save_pretrained(folder)
    return folder


def server(base, folders, **fields):
    options = {"base_model": str(base), "port": 0, "dtype": "float32", "device": "cpu", "api_key": TOKEN}
    return running_server(ServeOptions(**options, adapter=[f"{k}={v}" for k, v in folders.items()], **fields))


def client(url):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE)


def ask(http, name, prompt):
    answer = http.post("/v1/completions", json={"model": name, "prompt": prompt, "max_tokens": 8})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@functools.cache
def texts_of_generate(base, folder):
    model, tokenizer = load_model(base, folder, dtype="float32", device="cpu"), load_tokenizer(base)
    return {prompt: generate_text(model, tokenizer, prompt, max_new_tokens=8) for prompt in PROMPTS}


def expected(base, folders):
    models = {base.name: None, **folders}
    return {(name, prompt): texts_of_generate(base, models[name])[prompt] for name in models for prompt in PROMPTS}


def answers(http, wanted):
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
        found = {key: pool.submit(ask, http, *key) for key in wanted}
        return {key: future.result() for key, future in found.items()}


@pytest.fixture(scope="module")
def plain_dir(endless_model_dir, tmp_path_factory):
    return trained(endless_model_dir, tmp_path_factory.mktemp("plain") / "plain", mixture(), 0)


@pytest.mark.parametrize(
    ("kind", "modules", "is_reversed"),
    [
        (mixture, ["lm_head"], False),
        *slow((mixture, ["norm"], False), (mixture, ["lm_head"], True), (lora, ["lm_head"], False)),
        *slow((lora, ["norm"], False), (lora, ["norm"], True)),
    ],
)
def test_adapter_with_modules_to_save_beside_one_without(kind, modules, is_reversed, endless_model_dir, tmp_path):
    folders = {
        "plain": trained(endless_model_dir, tmp_path / "plain", kind(), 0),
        "whole": trained(endless_model_dir, tmp_path / "whole", kind(modules_to_save=modules), 1),
    }
    if is_reversed:
        folders = dict(reversed(folders.items()))
    wanted = expected(endless_model_dir, folders)
    assert len(set(wanted.values())) == len(wanted)
    with server(endless_model_dir, folders) as url, client(url) as http:
        assert answers(http, wanted) == wanted


@pytest.mark.parametrize(
    ("kind", "modules"), [(mixture, ["norm"]), *slow((mixture, ["lm_head"]), (lora, ["norm"]), (lora, ["lm_head"]))]
)
def test_adapter_with_modules_to_save_is_loaded_once_no_answers_are_mixed(kind, modules, endless_model_dir, tmp_path):
    first = {"plain": trained(endless_model_dir, tmp_path / "plain", kind(), 0)}
    second = {"whole": trained(endless_model_dir, tmp_path / "whole", kind(modules_to_save=modules), 1)}
    wanted = expected(endless_model_dir, first | second)
    long = {"prompt": PROMPTS[0], "max_tokens": 250, "stream": True}
    with server(endless_model_dir, first, adapter_root=str(tmp_path)) as url, contextlib.ExitStack() as stack:
        streams = []
        for name in (endless_model_dir.name, "plain"):
            http = stack.enter_context(client(url))
            body = long | {"model": name}
            lines = stack.enter_context(http.stream("POST", "/v1/completions", json=body)).iter_lines()
            next(lines)
            stack.callback(lines.close)
            streams.append(lines)
        http = stack.enter_context(client(url))
        refused = load(http, "whole", "whole", 409)["error"]["message"]
        assert "has `modules_to_save`, answers may have to take turns" in refused
        for lines in streams:
            assert [line for line in lines if line][-1] == "data: [DONE]"
        load(http, "whole", "whole", 200)
        assert answers(http, wanted) == wanted


def test_loading_trained_tokens_does_not_change_other_adapters(tied_dir, tmp_path):
    first = {"plain": trained(tied_dir, tmp_path / "plain", mixture(), 0)}
    tokens = [*range(40, 120)]
    second = {"tokens": trained(tied_dir, tmp_path / "tokens", mixture(trainable_token_indices=tokens), 1)}
    wanted = expected(tied_dir, first | second)
    with server(tied_dir, first, adapter_root=str(tmp_path)) as url, client(url) as http:
        load(http, "tokens", "tokens", 200)
        assert {key: ask(http, *key) for key in wanted} == wanted  # in order: the first adapter's answers come first


def load(http, name, path, status):
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
    assert answer.status_code == status, answer.text
    return answer.json()


def test_chats_use_the_template_beside_each_adapter(plain_dir, endless_model_dir, tmp_path, caplog):
    """TRL saves it there. The tiny model has none."""
    folders = {name: str(shutil.copytree(plain_dir, tmp_path / name)) for name in "abcd"}
    template = "{{ bos_token }}{% for message in messages %}<{{ message.content }}>{% endfor %}"
    (tmp_path / "a" / "chat_template.jinja").write_text(template, encoding="utf-8")
    # Its own end token, which its template writes and which ends its answers.
    config = json.dumps({"chat_template": template.replace("<", "[") + "{{ eos_token }}", "eos_token": "<s>"})
    (tmp_path / "b" / "tokenizer_config.json").write_text(config, encoding="utf-8")
    (tmp_path / "c" / "chat_template.jinja").write_text(template, encoding="utf-8")
    (tmp_path / "c" / "run.json").write_text('{"template": "meta"}', encoding="utf-8")
    del folders["d"]  # it is loaded later
    (tmp_path / "d" / "chat_template.jinja").write_text(template.replace("<", "("), encoding="utf-8")

    def chat(http, name):
        body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 8}
        return http.post("/v1/chat/completions", json=body)

    with server(endless_model_dir, folders, adapter_root=str(tmp_path)) as url, client(url) as http:
        load(http, "d", "d", 200)
        for name, prompt in {"a": "<x>", "b": "[x><s>", "d": "(x>"}.items():
            assert chat(http, name).json()["choices"][0]["message"]["content"] == ask(http, name, prompt)
        assert "has a chat template" in chat(http, "c").json()["error"]["message"]
    assert "'c' was trained with the prompt template meta" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"bias": "all"}, *slow({"layer_replication": [[0, 3], [1, 4]]}, {"init_lora_weights": "pissa"})],
)
def test_adapter_that_changes_the_base_model_is_served_alone(settings, endless_model_dir, tmp_path, caplog):
    """With `bias` an adapter may have trained biases of the base model, although the tiny model has none."""
    alone = {"alone": trained(endless_model_dir, tmp_path / "alone", lora(**settings), 0)}
    plain = {"plain": trained(endless_model_dir, tmp_path / "plain", lora(), 1)}
    wanted = {key: text for key, text in expected(endless_model_dir, alone).items() if key[0] == "alone"}
    with server(endless_model_dir, alone) as url, client(url) as http:
        assert answers(http, wanted) == wanted
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["alone"]
    assert "The base model has no name here" in caplog.text
    for others, fields in ((plain, {}), ({}, {"adapter_root": str(tmp_path)})):
        with pytest.raises(MolaError, match="Serve it alone"), server(endless_model_dir, alone | others, **fields):
            pass
    with server(endless_model_dir, plain, adapter_root=str(tmp_path)) as url, client(url) as http:
        assert "Serve it alone" in load(http, "alone", "alone", 400)["error"]["message"]
    with (
        pytest.raises(MolaError, match="mola generate"),
        running_demo(
            DemoOptions(base_model=str(endless_model_dir), adapter=alone["alone"], dtype="float32", device="cpu")
        ),
    ):
        pass


def test_initialisation_from_the_base_weights_changes_the_base_model():
    assert "kasa_config" in changes_base({"peft_type": "LORA", "kasa_config": {"beta": 1e-4}})
    assert changes_base({"peft_type": "LORA", "kasa_config": None, "init_lora_weights": True, "bias": "none"}) is None


def test_failed_loads_leave_no_adapter(plain_dir, endless_model_dir, tmp_path):
    path = shutil.copytree(plain_dir, tmp_path / "unknown") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "FOO"}))
    with server(endless_model_dir, {}, adapter_root=str(tmp_path)) as url, client(url) as http:
        assert "the installed PEFT knows" in load(http, "x", "unknown", 400)["error"]["message"]
        assert "below the server's" in load(http, "x", ".", 400)["error"]["message"]
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [endless_model_dir.name]


def test_cancelled_requests_leave_the_queue_while_another_is_answered(endless_model_dir, monkeypatch):
    joined, left = [], []

    def submit(self, *arguments, submit=RequestQueue.submit, **more):
        joined.append(submit(self, *arguments, **more))
        return joined[-1]

    def forget(self, request, forget=RequestQueue._forget):
        forget(self, request)
        left.append(request)  # again if the engine met it after it was cancelled

    go_on = threading.Event()
    go_on.set()

    def on_token(self, *arguments, on_token=_AnswerListener.on_token):
        assert go_on.wait(PATIENCE)
        return on_token(self, *arguments)

    monkeypatch.setattr(_AnswerListener, "on_token", on_token)
    monkeypatch.setattr(RequestQueue, "_forget", forget)
    body = {"model": endless_model_dir.name, "prompt": "x", "max_tokens": 500}
    with (
        server(endless_model_dir, {}, max_batch_size=1) as url,
        client(url) as http,
        http.stream("POST", "/v1/completions", json=body | {"stream": True}) as running,
    ):
        lines = running.iter_lines()
        next(lines)
        go_on.clear()  # the answer that is running outlasts the clients that give up
        monkeypatch.setattr(RequestQueue, "submit", submit)
        while len(joined) < 3:  # on a busy machine a client may give up before its request has joined the queue
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.2)
        wait_until(lambda: {*joined} <= {*left})
        assert [(request.rows, request.started) for request in joined] == [([], None)] * len(joined)
        go_on.set()
        assert "data: [DONE]" in [*lines]


def test_after_a_failure_of_the_engine_every_request_gets_an_error(endless_model_dir, monkeypatch):
    def fail(self):
        raise RuntimeError("a bug")

    with server(endless_model_dir, {}) as url, client(url) as http:
        assert http.get("/health").status_code == 200
        monkeypatch.setattr("mola.generation.batching.engine.BatchEngine.step", fail)
        for _ in range(2):
            answer = http.post("/v1/completions", json={"model": endless_model_dir.name, "prompt": "a"})
            assert answer.status_code == 500
            assert "must be restarted" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 500


def test_tokens_without_an_embedding_and_messages_that_the_template_refuses(endless_model_dir, tmp_path):
    base = shutil.copytree(endless_model_dir, tmp_path / "grown")
    own = PreTrainedTokenizerFast.from_pretrained(base)
    own.add_tokens(["<new>"])
    own.save_pretrained(base)
    (base / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}", encoding="utf-8")
    with server(base, {}) as url, client(url) as http:
        for path, body, message in (
            ("completions", {"prompt": "a<new>"}, "258"),
            ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "roles must alternate"),
        ):
            answer = http.post(f"/v1/{path}", json={"model": "grown", **body})
            assert answer.status_code == 400
            assert message in answer.json()["error"]["message"]

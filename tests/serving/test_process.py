"""Start and end of the server: options, signals, a full queue, models without a chat template."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")
openai = pytest.importorskip("openai", reason="needs the extra `test`")

from mola.errors import MolaError  # noqa: E402
from mola.options.parsing import parse  # noqa: E402
from mola.serving.serve import ServeOptions, adapter_folders, main, running_server  # noqa: E402

from ..grids import slow  # noqa: E402
from ..ports import free_port  # noqa: E402
from ..waiting import PATIENCE, wait_until  # noqa: E402

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 900, "stream": True}
Client, get, post = (partial(each, timeout=PATIENCE) for each in (httpx.Client, httpx.get, httpx.post))


@pytest.fixture
def options(endless_model_dir):
    # One answer after the other: so it is known who runs and who waits.
    return ServeOptions(base_model=str(endless_model_dir), port=0, dtype="float32", device="cpu", max_batch_size=1)


def health(url):
    try:
        return get(f"{url}/health").json()
    except httpx.TransportError:
        return {"running": 0, "waiting": 0}


@pytest.fixture(scope="module")
def single_url(endless_model_dir):
    """A server that answers one request after the other and lets two wait."""
    fields = {"dtype": "float32", "device": "cpu", "max_batch_size": 1, "max_waiting": 2}
    with running_server(ServeOptions(base_model=str(endless_model_dir), port=0, **fields)) as url:
        yield url


def test_base_without_chat_template_points_at_completions(single_url):
    with openai.OpenAI(base_url=f"{single_url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="chat template for `messages`.*/v1/completions"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
        assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices[0].text


def test_max_batch_total_tokens_limits_one_answer(options, caplog):
    options.max_batch_size, options.max_batch_total_tokens, options.max_batch_prefill_tokens = 2, 64, 3
    caplog.set_level("INFO")
    with running_server(options) as url:
        ask = partial(post, f"{url}/v1/completions")
        assert "Up to 2 answers side by side, 64 tokens together" in caplog.text
        body = {"model": "tiny", "prompt": "abcdefgh"}
        assert ask(json=body).json()["usage"]["total_tokens"] == 64  # without `max_tokens`: what there is room for
        refused = ask(json=body | {"max_tokens": 60})
        assert refused.status_code == 400
        assert "must fit into 64 tokens, this server's `max_batch_total_tokens`" in refused.json()["error"]["message"]


def test_max_batch_total_tokens_needs_a_batch(options):
    options.max_batch_total_tokens = 64
    with (
        pytest.raises(MolaError, match="one after the other: `max_batch_size` is 1"),
        running_server(options),
    ):
        pass


def test_a_full_queue_refuses_requests_until_there_is_room(single_url):
    url = single_url
    with contextlib.ExitStack() as stack:
        for number in range(3):
            http = stack.enter_context(Client(base_url=url))
            running = stack.enter_context(http.stream("POST", "/v1/completions", json=LONG))
            if number == 0:
                lines = running.iter_lines()  # keep a reference: httpx closes a connection without one
                next(lines)  # of the waiting ones only the headers come
        assert health(url) == {"status": "ok", "running": 1, "waiting": 2}
        metrics = get(f"{url}/metrics").text
        found = re.findall(r"^mola_(?:batch_size|requests_running|requests_waiting) (.+)$", metrics, re.M)
        assert found == ["1.0", "1.0", "2.0"]
        refused = post(f"{url}/v1/completions", json=LONG)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["Retry-After"]) >= 1
        assert post(f"{url}/v1/completions", json=LONG).status_code == 429
    wait_until(lambda: health(url) == {"status": "ok", "running": 0, "waiting": 0})
    assert post(f"{url}/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200


def test_more_connections_than_allowed_are_answered_with_503(options):
    options.max_connections = 1
    with running_server(options) as url, Client(base_url=url) as first, Client(base_url=url) as second:
        assert first.get("/health").status_code == 200  # this connection stays open
        assert second.get("/health").status_code == 503


def test_lack_of_memory_ends_one_request_only(single_url, monkeypatch):
    ask = partial(post, f"{single_url}/v1/completions")
    with monkeypatch.context() as patch:
        patch.setattr("mola.generation.predicting.generate_batch", lambda *_, **__: torch.empty(1 << 50))
        answer = ask(json=LONG | {"stream": False})
    assert answer.status_code == 503
    assert "memory" in answer.json()["error"]["message"]
    assert ask(json=LONG | {"max_tokens": 1}).status_code == 200


def run_main_and_stop(options, sign, num_streams, max_tokens, times=1):
    """Exit code of the command, and the lines of every stream; signals come while the first one runs."""
    url = f"http://127.0.0.1:{options.port}"

    def read():
        lines, body = [], LONG | {"max_tokens": max_tokens}
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # a connection that was cut
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as answer,
        ):
            lines.extend(line for line in answer.iter_lines() if line)
        return lines

    def visit():
        wait_until(lambda: "status" in health(url))
        streams = []
        while len(streams) < num_streams:
            streams.append(pool.submit(read))
            wait_until(lambda: health(url)["running"] + health(url)["waiting"] == len(streams))
        wait_until(lambda: health(url)["running"])
        for number in range(times):
            time.sleep(0.1 if number else 0)
            os.kill(os.getpid(), sign)
        return [stream.result(PATIENCE) for stream in streams]

    with ThreadPoolExecutor() as pool:
        visiting = pool.submit(visit)
        return main(options), visiting.result(PATIENCE)


@pytest.mark.parametrize("sign", [signal.SIGTERM, *slow(signal.SIGINT)])
def test_signals_let_the_running_answer_finish(sign, options):
    options.port, options.shutdown_timeout = free_port(), 300
    before = signal.getsignal(sign)
    code, (running, waiting) = run_main_and_stop(options, sign, num_streams=2, max_tokens=400)
    assert code == 0
    assert signal.getsignal(sign) is before
    assert running[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in running[-2]
    assert '"code":"stopping"' in waiting[-1]
    assert len(waiting) == 1


@pytest.fixture
def patient_options(options, tmp_path):
    """With room for an answer that takes minutes, however late this program comes to do its part."""
    folder = shutil.copytree(options.base_model, tmp_path / "tiny")
    settings = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    (folder / "config.json").write_text(json.dumps(settings))
    return replace(options, base_model=str(folder), port=free_port(), max_tokens=90_000)


def test_a_second_interrupt_does_not_wait(patient_options):
    options, start = replace(patient_options, shutdown_timeout=300), time.monotonic()
    code, (running,) = run_main_and_stop(options, signal.SIGINT, num_streams=1, max_tokens=90_000, times=2)
    assert code == 0
    assert running[-1:] != ["data: [DONE]"]
    assert time.monotonic() - start < 250, "it waited for the answer"


def test_signals_end_an_answer_that_takes_too_long(patient_options):
    options = replace(patient_options, shutdown_timeout=0.2)
    code, (running,) = run_main_and_stop(options, signal.SIGTERM, num_streams=1, max_tokens=90_000)
    assert code == 0
    assert '"code":"stopping"' in running[-1]


@pytest.mark.slow
def test_command_exits_with_0_and_never_shows_its_token(tiny_model_dir):
    token = "a-secret-token"
    command = [sys.executable, "-m", "mola.cli", "serve", "--base_model", str(tiny_model_dir), "--port", "0"]
    environment = os.environ | {"MOLA_API_KEY": token, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.search(r"http://\S+", line):
                break
        url = found[0]
        headers = {"Authorization": f"Bearer {token}"}
        name = get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"]
        body = LONG | {"model": name, "max_tokens": 20, "stream": False}
        assert post(f"{url}/v1/completions", json=body).status_code == 401
        assert post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200
        server.send_signal(signal.SIGTERM)
        lines += server.stdout.readlines()
        assert server.wait(PATIENCE) == 0
    text = "".join(lines)
    assert "POST /v1/completions 401" in text
    assert "POST /v1/completions 200" in text
    assert token not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": ["missing"]}, "`adapter` must be a folder.*'missing'"),
        ({"adapter": ["name="]}, "NAME=FOLDER or FOLDER: got 'name='"),
        ({"adapter": ["a=x/b", "a=y/b"]}, "'y/b' has the name 'a', which 'x/b' already has"),
        ({"adapter": ["x/tiny"]}, "'x/tiny' has the name 'tiny', which the base model already has"),
        ({"base_model": "does/not/exist"}, "`base_model`"),
        ({"max_batch_size": 0}, "`max_batch_size` must be at least 1: got 0"),
        ({"max_batch_prefill_tokens": 0}, "`max_batch_prefill_tokens` must be at least 1: got 0"),
        ({"host": "192.0.2.1"}, "`host` '192.0.2.1'"),
        ({"api_key": ""}, "`api_key` must be a token"),
        ({"api_key": "two words"}, "`api_key` must be a token"),
    ],
)
def test_wrong_options_are_refused(fields, message, options):
    for name, value in fields.items():
        setattr(options, name, value)
    with pytest.raises(MolaError, match=message) as raised:
        main(options)
    assert "two words" not in str(raised.value)


def test_a_taken_port_is_refused_before_the_model_loads(options, caplog):
    caplog.set_level("INFO", logger="mola")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options.port = taken.getsockname()[1]
        with pytest.raises(MolaError, match=f"`port` {options.port} cannot be used"):
            main(options)
    assert "Loading" not in caplog.text


def test_token_of_the_environment(options, monkeypatch):
    monkeypatch.setenv("MOLA_API_KEY", "from-outside")
    with running_server(options) as url:
        assert get(f"{url}/v1/models").status_code == 401
        assert get(f"{url}/v1/models", headers={"Authorization": "bearer from-outside"}).status_code == 200
    monkeypatch.setenv("MOLA_API_KEY", "")
    with pytest.raises(MolaError, match="the environment variable MOLA_API_KEY"):
        main(options)


@pytest.mark.parametrize(("api_key", "warns"), [(None, True), ("token", False)])
def test_an_open_address_without_token_gives_a_warning(api_key, warns, options, no_weights_dir, caplog):
    options.host, options.api_key, options.base_model = "0.0.0.0", api_key, str(no_weights_dir)
    with pytest.raises(MolaError), running_server(options):  # the warning comes before the weights are read
        pass
    assert ("Anyone who reaches 0.0.0.0" in caplog.text) == warns


def test_missing_packages_are_named(options, monkeypatch, capsys):
    monkeypatch.setattr("mola.serving.serve.find_spec", lambda name: None)
    with pytest.raises(MolaError, match="pip install 'mola-peft\\[serve\\]'"):
        main(options)


def test_adapters_are_named_by_hand_or_after_their_folder(options, tmp_path):
    odd = tmp_path / "lr=1e-4"
    odd.mkdir()
    words = ["--base_model", options.base_model, "--adapter", "a=runs/x", "runs/y.2", "--adapter", str(odd)]
    parsed = parse(ServeOptions, words, prog="mola serve")
    expected = {"a": "runs/x", "y.2": "runs/y.2", "lr=1e-4": str(odd)}
    assert adapter_folders(parsed) == expected
    recipe = tmp_path / "serve.yaml"
    recipe.write_text("adapter: [b=runs/z]\n")
    parsed = parse(ServeOptions, [*words, "--config", str(recipe)], prog="mola serve")
    assert adapter_folders(parsed) == {"b": "runs/z"} | expected


def test_options_do_not_show_the_token(options):
    options.api_key = "a-secret-token"
    assert "a-secret-token" not in repr(options)

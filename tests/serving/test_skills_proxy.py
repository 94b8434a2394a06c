"""The proxy in front of vLLM, here in front of mola's own server, which has the LoRAs of a skills folder by name."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")

from mola.checkpoints.skills_folder import read_skills  # noqa: E402
from mola.errors import MolaError  # noqa: E402
from mola.serving.model_names import name_behind  # noqa: E402
from mola.serving.serve import ServeOptions, running_server  # noqa: E402
from mola.serving.vllm_skills import run_vllm_skills, vllm_skills_arguments  # noqa: E402

from ..waiting import PATIENCE  # noqa: E402
from .proxies import running_proxy  # noqa: E402
from .skills_folders import FOLDER, KINDS, MARKS, chats  # noqa: E402

TOKEN = "a-secret-token"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
NEW_TOKENS = 12
FIELDS = {"dtype": "float32", "device": "cpu", "port": 0, "api_key": TOKEN}


@pytest.fixture(scope="module")
def http(skills_root, chat_model_dir):
    """A client of the proxy."""
    folder = skills_root / FOLDER
    adapters = [f"{name_behind(name, folder / name)}={folder / name}" for name in ("numbers", "shouts")]
    behind = ServeOptions(base_model=str(chat_model_dir), adapter=adapters, adapter_root=str(skills_root), **FIELDS)
    with (
        running_server(behind) as upstream,
        running_proxy(upstream, folder, chat_model_dir, str(skills_root), TOKEN) as url,
        httpx.Client(base_url=url, headers=HEADERS, timeout=PATIENCE) as http,
    ):
        yield http


def complete(http, prompt, model=FOLDER, **values):
    return http.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, **values})


@pytest.mark.parametrize(("skill", "prompt"), KINDS)
def test_the_skill_that_knows_answers_and_the_answer_says_so(skill, prompt, http, own_answer):
    whole = complete(http, prompt)
    assert whole.headers["X-Mola-Skill"] == (skill or "base")
    assert whole.json()["usage"]["skill"] == skill
    assert whole.json()["model"] == FOLDER
    assert whole.json()["choices"][0]["text"] == own_answer(skill, prompt)
    streamed = complete(http, prompt, stream=True, stream_options={"include_usage": True})
    *chunks, last, end = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert streamed.headers["X-Mola-Skill"] == (skill or "base")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert end == "[DONE]"
    assert json.loads(last)["usage"] == whole.json()["usage"]
    assert {json.loads(chunk)["model"] for chunk in [*chunks, last]} == {FOLDER}
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == own_answer(skill, prompt)


def test_a_name_forces_its_skill(http, own_answer):
    prompt = KINDS[0][1]
    for model, skill in (("shouts", "shouts"), ("tiny-chat", None)):
        answer = complete(http, prompt, model)
        assert answer.headers["X-Mola-Skill"] == (skill or "base")
        assert answer.json()["choices"][0]["text"] == own_answer(skill, prompt)


def test_requests_at_once_are_decided_together(http, own_answer):
    async def ask_all():
        async with httpx.AsyncClient(base_url=http.base_url, headers=HEADERS, timeout=PATIENCE) as client:
            body = {"model": FOLDER, "max_tokens": NEW_TOKENS}
            asked = [client.post("/v1/completions", json=body | {"prompt": prompt}) for _, prompt in KINDS * 5]
            return [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [own_answer(skill, prompt) for skill, prompt in KINDS * 5]


def test_chats_are_decided_by_their_last_turn(http):
    for skill, messages in chats():
        body = {"model": FOLDER, "messages": messages, "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body).json()["usage"]["skill"] == skill
        parts = [{"type": "text", "text": messages[-1]["content"]}]
        body["messages"] = [*messages[:-1], {"role": "user", "content": parts}]
        assert http.post("/v1/chat/completions", json=body).json()["usage"]["skill"] == skill


def test_models_health_and_metrics(http):
    assert http.get("/health").json()["status"] == "ok"
    listed = http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [FOLDER, "numbers", "shouts", "tiny-chat", "base"]
    for model in listed:
        assert http.get(f"/v1/models/{model['id']}").json() == model
    assert http.get("/v1/models/nothing").status_code == 404
    metrics = http.get("/metrics").text
    assert 'mola_answers_total{skill="numbers"}' in metrics
    assert "mola_time_to_first_token_seconds" in metrics
    assert http.get("/nothing").status_code == 404


def test_wrong_requests(http):
    unknown = complete(http, "x", "other")
    assert unknown.status_code == 404
    assert "skills, numbers, shouts, tiny-chat, base" in unknown.json()["error"]["message"]
    assert "one text" in complete(http, ["a", "b"]).json()["error"]["message"]
    assert complete(http, "x", "numbers", echo=True).status_code == 400  # in the words of the server behind
    assert "echo" in complete(http, "x", echo=True).json()["error"]["message"]
    assert http.post("/v1/completions", content=b"[1").status_code == 400
    assert http.post("/v1/chat/completions", json={"model": FOLDER, "messages": "x"}).status_code == 400
    assert http.post("/v1/completions", json={"model": FOLDER}).status_code == 400
    assert httpx.post(f"{http.base_url}/v1/completions", json={}, timeout=PATIENCE).status_code == 401


def test_skills_come_and_go(http, skills_root, own_answer):
    path = str(skills_root / "more" / "marks")
    assert complete(http, MARKS).json()["usage"]["skill"] != "marks"
    for _ in range(2):
        body = {"lora_name": "marks", "lora_path": path}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        answer = complete(http, MARKS)
        assert answer.headers["X-Mola-Skill"] == "marks"
        assert answer.json()["choices"][0]["text"] == own_answer("marks", MARKS)
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "marks"}).status_code == 200
        assert complete(http, MARKS, "marks").status_code == 404
        assert complete(http, MARKS).json()["usage"]["skill"] != "marks"


def test_a_skill_has_another_name_behind_if_its_files_differ(skills_root, tmp_path):
    folder = skills_root / FOLDER / "numbers"
    name = name_behind("marks", folder)
    assert name.startswith("marks@")
    assert name == name_behind("marks", shutil.copytree(folder, tmp_path / "copy"))
    assert name != name_behind("marks", skills_root / "more" / "marks")
    config = tmp_path / "copy" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"lora_alpha": 3}), "utf-8")
    assert name != name_behind("marks", tmp_path / "copy")


def test_command_of_vllm_has_every_skill(skills_root):
    folder = skills_root / FOLDER
    options = ServeOptions(adapter=[str(folder)], engine="vllm", max_tokens=7, max_loaded_skills=5)
    names_behind = {None: "tiny", "numbers": "numbers@1", "shouts": "shouts@2"}
    words = vllm_skills_arguments(options, names_behind, read_skills(folder), "/run/socket")
    at = words.index("--lora-modules")
    assert [json.loads(word) for word in words[at + 1 :]] == [
        {"name": names_behind[name], "path": str(folder / name)} for name in ("numbers", "shouts")
    ]
    text = " ".join(words[:at])
    assert "--served-model-name tiny --dtype auto" in text
    assert "--uds /run/socket --max-loras 2 --max-cpu-loras 5 --enable-lora --max-lora-rank 8" in text
    assert '"max_new_tokens": 7' in text
    assert "--host" not in words


def test_a_skill_that_vllm_would_read_wrongly_is_refused(skills_root, tmp_path):
    folder = Path(shutil.copytree(skills_root / FOLDER, tmp_path / "skills"))
    path = folder / "numbers" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"alpha_pattern": {"q_proj": 2}}), "utf-8")
    names_behind = {None: "tiny", "numbers": "numbers@1", "shouts": "shouts@2"}
    with pytest.raises(MolaError, match="`alpha_pattern` must be empty: vLLM ignores that of .*numbers"):
        vllm_skills_arguments(ServeOptions(adapter=[str(folder)]), names_behind, read_skills(folder), "/run/socket")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_waiting": 3}, "`max_waiting` must be left out"), ({"load_in_4bit": True}, "`load_in_4bit` must be left")],
)
def test_what_vllm_cannot_do_is_refused(options, message, skills_root):
    folder = str(skills_root / FOLDER)
    with pytest.raises(MolaError, match=message):
        run_vllm_skills(ServeOptions(adapter=[folder], engine="vllm", **options), FOLDER, folder, "tiny", None)

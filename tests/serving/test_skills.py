"""`mola serve` with a skills folder: who answers, what the answer says, and skills that come and go."""

import asyncio
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")
openai = pytest.importorskip("openai", reason="needs the extra `test`")

from mola import Skills  # noqa: E402
from mola.checkpoints.adapter_settings import SKILLS_FILE  # noqa: E402
from mola.errors import MolaError  # noqa: E402
from mola.serving.request_queue import RequestQueue  # noqa: E402
from mola.serving.serve import ServeOptions, running_server  # noqa: E402

from ..waiting import PATIENCE, wait_until  # noqa: E402
from .conftest import OWN_TEMPLATE  # noqa: E402
from .skills_folders import FOLDER, KINDS, LONG, MARKS, NO_KIND, chats, prompt_of, save_lora  # noqa: E402

TOKEN = "a-secret-token"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
MAX_PREFILL = 24  # tokens
NEW_TOKENS = 12
FIELDS = {"dtype": "float32", "device": "cpu", "port": 0}


@pytest.fixture(scope="module", params=[8, pytest.param(1, marks=pytest.mark.slow)], ids=["batch", "single"])
def url(request, skills_root):
    options = ServeOptions(
        adapter=[str(skills_root / FOLDER)],
        adapter_root=str(skills_root),
        api_key=TOKEN,
        max_batch_size=request.param,
        max_batch_prefill_tokens=MAX_PREFILL,
        max_loaded_skills=1,
        **FIELDS,
    )
    with running_server(options) as url:
        yield url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, headers=HEADERS, timeout=PATIENCE) as http:
        yield http


def complete(http, prompt, model=FOLDER, **values):
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, **values}
    return http.post("/v1/completions", json=body)


def events(answer):
    """The chunks of a streamed answer."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return list(map(json.loads, lines))


def load(http, name, path, **values):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **values})


def unload(http, name):
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def value(http, name):
    found = re.search(rf"^{re.escape(name)} (\S+)$", http.get("/metrics").text, re.M)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize(("skill", "prompt"), KINDS)
def test_the_skill_that_knows_answers_and_the_answer_says_so(skill, prompt, http, own_answer):
    whole = complete(http, prompt)
    assert whole.headers["X-Mola-Skill"] == (skill or "base")
    assert whole.json()["usage"]["skill"] == skill
    assert whole.json()["model"] == FOLDER
    assert whole.json()["choices"][0]["text"] == own_answer(skill, prompt)
    streamed = complete(http, prompt, stream=True, stream_options={"include_usage": True})
    *chunks, last = events(streamed)
    assert streamed.headers["X-Mola-Skill"] == (skill or "base")
    assert last["usage"] == whole.json()["usage"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == own_answer(skill, prompt)


@pytest.mark.parametrize(("model", "skill"), [("shouts", "shouts"), ("base", None), ("tiny-chat", None)])
def test_a_name_forces_its_skill(model, skill, http, own_answer):
    answer = complete(http, KINDS[0][1], model)
    assert answer.headers["X-Mola-Skill"] == (skill or "base")
    assert answer.json()["usage"]["skill"] == skill
    assert answer.json()["choices"][0]["text"] == own_answer(skill, KINDS[0][1])


def test_answers_of_different_skills_in_one_batch_are_each_skills_own(url, own_answer):
    cases = [(FOLDER, skill, prompt) for skill, prompt in KINDS] + [("base", None, KINDS[0][1])]
    cases += [(skill, skill, NO_KIND) for skill in ("numbers", "shouts")]
    cases = [(*case, streams) for case in cases for streams in (True, False)] * 2

    async def ask(client, model, skill, prompt, streams):
        body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "stream": streams}
        answer = await client.post("/v1/completions", json=body)
        chunks = events(answer) if streams else [answer.json()]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert (answer.headers["X-Mola-Skill"], text) == (skill or "base", own_answer(skill, prompt))

    async def ask_all():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE) as client:
            await asyncio.gather(*(ask(client, *case) for case in cases))

    asyncio.run(ask_all())


def test_a_prompt_that_is_read_in_parts(http, own_answer):
    assert len(LONG) > 2 * MAX_PREFILL
    answer = complete(http, LONG)
    assert answer.headers["X-Mola-Skill"] == "numbers"
    assert answer.json()["choices"][0]["text"] == own_answer("numbers", LONG)


def test_each_turn_is_decided_anew(http):
    for skill, messages in chats():
        body = {"model": FOLDER, "messages": messages, "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body).json()["usage"]["skill"] == skill


def test_a_request_with_several_prompts_names_every_skill(http, own_answer):
    prompts = [prompt for _, prompt in KINDS]
    answer = complete(http, prompts, n=2)
    assert answer.headers["X-Mola-Skill"] == "numbers, shouts, base"
    assert answer.json()["usage"]["skill"] == ["numbers", "numbers", "shouts", "shouts", None, None]
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts == [own_answer(skill, prompt) for skill, prompt in KINDS for _ in range(2)]


def test_models_and_unknown_names(url, http):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
        names = [FOLDER, "numbers", "shouts", "tiny-chat", "base"]
        assert [model.id for model in client.models.list()] == names
        with pytest.raises(openai.NotFoundError, match=f"'other' does not exist here.*{', '.join(names)}"):
            client.completions.create(model="other", prompt="x")


def test_memory_is_bounded_and_answers_are_counted_by_skill(http):
    before = {name: value(http, f'mola_answers_total{{skill="{name}"}}') for name in ("numbers", "shouts", "base")}
    for _, prompt in (*KINDS, KINDS[0]):
        complete(http, prompt, n=2)
    wait_until(lambda: value(http, 'mola_answers_total{skill="numbers"}') == before["numbers"] + 4)
    assert value(http, 'mola_answers_total{skill="shouts"}') == before["shouts"] + 2
    assert value(http, 'mola_answers_total{skill="base"}') == before["base"] + 2
    assert value(http, "mola_skills_loaded") == 1


def test_skills_come_and_go_while_answers_run(http, own_answer):
    def answer():
        return complete(http, KINDS[0][1], max_tokens=60)

    assert complete(http, MARKS).json()["usage"]["skill"] != "marks"
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(answer) for _ in range(2)]
        assert load(http, "marks", "more/marks").status_code == 200
        assert "'marks' is taken" in load(http, "marks", "more/marks").json()["error"]["message"]
        for model in (FOLDER, "marks"):
            marked = complete(http, MARKS, model)
            assert marked.headers["X-Mola-Skill"] == "marks"
            assert marked.json()["choices"][0]["text"] == own_answer("marks", MARKS)
            body = {"model": model, "messages": [{"role": "user", "content": MARKS}], "max_tokens": NEW_TOKENS}
            chat = http.post("/v1/chat/completions", json=body).json()
            assert chat["choices"][0]["message"]["content"] == own_answer("marks", f"[{MARKS}]")  # its own template
        running.append(pool.submit(complete, http, MARKS, max_tokens=60))
        wait_until(lambda: running[-1].done() or http.get("/health").json()["running"])
        assert unload(http, "marks").status_code == 200
        assert running[-1].result().status_code == 200  # it kept its skill
        for each in running[:2]:
            assert each.result().json()["choices"][0]["text"] == own_answer("numbers", KINDS[0][1], 60)
    assert complete(http, MARKS).json()["usage"]["skill"] != "marks"
    assert complete(http, MARKS, "marks").status_code == 404


def test_the_last_skill_may_go_too(http):
    folders = {"numbers": f"{FOLDER}/numbers", "shouts": f"{FOLDER}/shouts"}
    for name in folders:
        assert unload(http, name).status_code == 200
    assert complete(http, KINDS[0][1]).headers["X-Mola-Skill"] == "base"
    for name, path in folders.items():
        assert load(http, name, path).status_code == 200
    assert complete(http, KINDS[0][1]).headers["X-Mola-Skill"] == "numbers"


def test_a_server_and_its_restart_decide_alike(skills_root, tmp_path):
    folder = tmp_path / FOLDER
    shutil.copytree(skills_root / FOLDER, folder)
    settings = json.loads((folder / SKILLS_FILE).read_text("utf-8"))
    (folder / SKILLS_FILE).write_text(json.dumps({**settings, "threshold": 0.05, "reject_rate": 0.5}), "utf-8")
    shutil.copytree(skills_root / "more", tmp_path / "more")
    options = ServeOptions(adapter=[str(folder)], adapter_root=str(tmp_path), api_key=TOKEN, **FIELDS)
    prompts = [prompt_of(kind, number) for kind in ("numbers", "shouts", "marks") for number in range(60, 75)]

    def skills(http):
        return [complete(http, prompt, max_tokens=1).json()["usage"]["skill"] for prompt in prompts]

    with running_server(options) as url, httpx.Client(base_url=url, headers=HEADERS, timeout=PATIENCE) as http:
        before = skills(http)
        assert load(http, "marks", "more/marks").status_code == 200
        added = skills(http)
        assert unload(http, "marks").status_code == 200
        removed = skills(http)
    assert before[:30] != added[:30]  # the reject rate sets another threshold than the folder's
    Skills(folder).merge(tmp_path / "more")
    with running_server(options) as url, httpx.Client(base_url=url, headers=HEADERS, timeout=PATIENCE) as http:
        assert skills(http) == added
    Skills(folder).remove("marks")
    with running_server(options) as url, httpx.Client(base_url=url, headers=HEADERS, timeout=PATIENCE) as http:
        assert skills(http) == removed


def test_a_decided_skill_ends_its_completions_with_its_own_token(skills_root, tmp_path, monkeypatch):
    folder = tmp_path / FOLDER
    shutil.copytree(skills_root / FOLDER, folder)
    config = json.dumps({"chat_template": OWN_TEMPLATE, "eos_token": "<s>"})
    (folder / "numbers" / "tokenizer_config.json").write_text(config, "utf-8")
    submitted = []
    submit = RequestQueue.submit

    def note(queue, jobs, *args, **kwargs):
        submitted.extend((job.adapter, list(job.stops)) for job in jobs)
        return submit(queue, jobs, *args, **kwargs)

    monkeypatch.setattr(RequestQueue, "submit", note)
    options = ServeOptions(adapter=[str(folder)], api_key=TOKEN, **FIELDS)
    with running_server(options) as url, httpx.Client(base_url=url, headers=HEADERS, timeout=PATIENCE) as http:
        complete(http, KINDS[0][1], "numbers", stop=["So"])
        complete(http, [prompt for _, prompt in KINDS], stop=["So"])
    named, *decided = submitted
    assert named == ("numbers", ["So", "<s>"])
    assert decided == [("numbers", ["So", "<s>"]), ("shouts", ["So"]), (None, ["So"])]


WRONG = {
    "no statistics": ("new", "loras/numbers", "must be one skill of a skills folder"),
    "the folder of skills": ("new", "more", "must be one skill of a skills folder"),
    "another layer": ("new", "deeper/deep", "layer"),
    "outside": ("new", "../x", "below"),
    "name of the folder": (FOLDER, "more/marks", "is taken"),
    "name of the base": ("base", "more/marks", "is taken"),
    "characters": ("a.b", "more/marks", "letters"),
}


@pytest.mark.parametrize(("name", "path", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_added_is_refused(name, path, message, http):
    answer = load(http, name, path)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_what_cannot_be_replaced_or_removed_is_refused(http):
    assert "cannot replace a skill" in load(http, "shouts", "more/marks", load_inplace=True).json()["error"]["message"]
    assert "is no skill" in unload(http, FOLDER).json()["error"]["message"]
    assert "is no skill" in unload(http, "base").json()["error"]["message"]
    assert unload(http, "other").status_code == 404


def test_options_that_contradict_each_other(skills_root, chat_model_dir, tmp_path):
    lora = save_lora(chat_model_dir, tmp_path / "lora", 0)
    wrong = {
        "Rename it": {"adapter": [f"numbers={skills_root / FOLDER}"]},
        "is the name of a skill": {"adapter": [str(skills_root / FOLDER)], "base_name": "numbers"},
        "alone: got 2 folders": {"adapter": [str(skills_root / FOLDER), str(lora)]},
        "`max_loaded_skills` needs a skills folder": {"adapter": [str(lora)], "max_loaded_skills": 3},
    }
    for message, options in wrong.items():
        with (
            pytest.raises(MolaError, match=message),
            running_server(ServeOptions(base_model=str(chat_model_dir), **options, **FIELDS)),
        ):
            pass

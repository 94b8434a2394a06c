"""Clients with a wrong token, under a false name, with names that are paths; and what neither logs nor errors say."""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from .raw import JSON, LAST, SECRET, TOKEN, ask, completion, error_of, request, serving

pytestmark = pytest.mark.usefixtures("unharmed")
AUTHORIZED = f"Authorization: Bearer {TOKEN}"


ODD_TOKENS = {
    "two, the second right": ["Authorization: Bearer no", AUTHORIZED],
    "two, the first right": [AUTHORIZED, "Authorization: Bearer no"],
    "the right one twice": [AUTHORIZED, AUTHORIZED],
    "another kind of blank": [f"Authorization: Bearer \xa0{TOKEN}\x85"],
    "a control character": [f"Authorization: Bearer \x1f{TOKEN}"],
    "a tab": [f"Authorization: Bearer\t{TOKEN}"],
    "another case": [AUTHORIZED.upper()],
    "a part of it": [AUTHORIZED[:-1]],
    "longer": [AUTHORIZED + TOKEN],
    "very long": ["Authorization: Bearer " + "a" * 50_000],
    "empty": ["Authorization:"],
    "in another header": [f"X-API-Key: {TOKEN}", f"Cookie: Authorization={TOKEN}", f"Proxy-{AUTHORIZED}"],
}


@pytest.mark.parametrize("headers", ODD_TOKENS.values(), ids=ODD_TOKENS)
def test_odd_tokens(headers, narrow_url):
    ((status, body),) = ask(narrow_url, request(headers=headers + LAST))
    assert status == 401
    assert TOKEN not in body.decode()


LIKE_THE_OPEN_ONE = ["//health", "/health/", "/./health", "/health;/v1/models", "/health%2f..%2fv1/models", "/HEALTH"]
LIKE_THE_OPEN_ONE += ["/health/../v1/models", "http://127.0.0.1/health", "/health%00", "*", f"/v1/models?key={TOKEN}"]


@pytest.mark.parametrize("path", LIKE_THE_OPEN_ONE)
def test_paths_like_the_open_one_need_the_token(path, narrow_url):
    assert ask(narrow_url, request(path, headers=LAST))[0][0] == 401


NAMES = ["../../../../etc/passwd", "/etc/passwd", "..", ".", "", "tiny/../tiny", "tiny\0", "tiny\n", "TINY", "served0"]
NAMES += ["file:///etc", "a" * 100_000, "\u202e", "default", "{0}", "%s", "__class__"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_models_are_names_not_paths(name, narrow_url):
    ((status, body),) = ask(narrow_url, completion(TOKEN, LAST, model=name))
    assert status == 404
    assert error_of(body)["code"] == "model_not_found"
    assert len(body) < 1000


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "%00", "%ff%fe", "tiny/", "x" * 999]
)
def test_paths_of_models_are_names_too(name, narrow_url):
    ((status, body),) = ask(narrow_url, request(f"/v1/models/{name}", token=TOKEN, headers=LAST))
    assert status == 404
    assert len(body) < 1000


def test_no_answer_leads_to_another_host(narrow_url):
    raw = request("/v1/completions/", "POST", token=TOKEN, host="elsewhere.example", headers=[*LAST, JSON], body=b"{}")
    ((status, body),) = ask(narrow_url, raw)
    assert status == 404
    assert b"elsewhere" not in body


HOSTS = {
    "elsewhere.example": 403,
    "127.0.0.1.elsewhere.example": 403,
    "localhost.elsewhere.example": 403,
    "xlocalhost": 403,
    "[": 403,
    "localhost": 200,
    "LOCALHOST:8000": 200,
    "page.localhost": 200,
    "127.0.0.1:1": 200,
    "[::1]:8000": 200,
    "192.168.1.2": 200,
    "": 200,
}


def test_without_token_web_pages_cannot_ask_under_a_name_of_their_own(endless_model_dir):
    with serving(endless_model_dir) as url:
        found = {host: ask(url, request(host=host, headers=LAST))[0] for host in HOSTS}
        body = found["elsewhere.example"][1]
    assert {host: status for host, (status, _) in found.items()} == HOSTS
    assert "Set MOLA_API_KEY" in error_of(body)["message"]


def test_with_a_token_every_name_is_answered(narrow_url):
    assert ask(narrow_url, request(host="elsewhere.example", token=TOKEN, headers=LAST))[0][0] == 200


PRIVATE = {
    "an object as prompt": {"prompt": {"text": SECRET}},
    "a list in a prompt": {"prompt": ["x", [SECRET]]},
    "an unknown field": {"other": SECRET},
    "half a character": {"prompt": SECRET + "\ud800"},
    "a prompt that is too long": {"prompt": SECRET * 1000},
    "an unknown part": {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": [{"txt": SECRET}]}]},
    "no list": {"path": "/v1/chat/completions", "messages": SECRET},
    "no message": {"path": "/v1/chat/completions", "messages": [SECRET]},
    "another field of a message": {
        "path": "/v1/chat/completions",
        "messages": [{"role": "user", "content": "x", "name": SECRET}],
    },
    "no template": {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": SECRET}]},
}


@pytest.mark.parametrize("fields", PRIVATE.values(), ids=PRIVATE)
def test_errors_do_not_repeat_prompts(fields, narrow_url):
    fields = dict(fields)
    path = fields.pop("path", "/v1/completions")
    body = {"model": "tiny"} | ({} if "messages" in fields else {"prompt": SECRET}) | fields
    ((status, answer),) = ask(
        narrow_url, request(path, "POST", token=TOKEN, headers=[JSON, *LAST], body=json.dumps(body).encode())
    )
    assert status == 400
    assert SECRET not in error_of(answer)["message"]

"""Clients that send what is no request, too slowly or too often, read nothing, and leave when they like."""

import contextlib
import json
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from ..grids import slow
from ..waiting import PATIENCE, wait_until
from .raw import (
    CHUNKED,
    CLIENT_TIMEOUT,
    JSON,
    LAST,
    MOST_CONNECTIONS,
    TOKEN,
    ask,
    completion,
    connected,
    error_of,
    is_idle,
    read_answer,
    read_to_end,
    request,
    serving,
    vanish,
)

pytestmark = pytest.mark.usefixtures("unharmed")


def completion_in_chunks(body):
    return request("/v1/completions", "POST", token=TOKEN, headers=[CHUNKED]) + body


NO_REQUEST = {
    "nothing but zeros": (b"\0" * 1000, 400),
    "the beginning of TLS": (bytes.fromhex("16030100a5010000a10303") + b"\0" * 100, 400),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 401),
    "HTTP/0.9": (b"GET /v1/models\r\n\r\n", 400),
    "a blank before the method": (b" " + request(token=TOKEN), 400),
    "no host": (request(token=TOKEN).replace(b"Host: 127.0.0.1\r\n", b""), 400),
    "two hosts": (request(token=TOKEN, headers=["Host: other"]), 400),
    "a character outside ASCII": (request("/v1/\xe9", token=TOKEN), 400),
    "NUL in a header": (request(token=TOKEN, headers=["X: a\0b"]), 400),
    "a header without end": (request(token=TOKEN, headers=["X: " + "a" * 1_000_000]), 431),
    "a path without end": (request("/" + "a" * 1_000_000, token=TOKEN), 431),
    "headers without end": (request(token=TOKEN, headers=["X: a"] * 100_000), 431),
    "two lengths": (completion(TOKEN, ["Content-Length: 3", "Content-Length: 5"]), 400),
    "two lengths in one": (completion(TOKEN, ["Content-Length: 3, 5"]), 400),
    "a signed length": (completion(TOKEN, ["Content-Length: +5"]), 400),
    "a negative length": (completion(TOKEN, ["Content-Length: -5"]), 400),
    "a length of 5000 digits": (completion(TOKEN, ["Content-Length: " + "9" * 5000]), 400),
    "length and chunks": (
        request("/v1/completions", "POST", token=TOKEN, headers=["Content-Length: 6", CHUNKED]) + b"0\r\n\r\n",
        400,
    ),
    "two encodings": (completion(TOKEN, [CHUNKED, CHUNKED]), 501),
    "an unknown encoding": (completion(TOKEN, ["Transfer-Encoding: xchunked"]), 501),
    "an encoding with a blank before its colon": (completion(TOKEN, ["Transfer-Encoding : chunked"]), 400),
    "a chunk that is no number": (
        request("/v1/completions", "POST", token=TOKEN, headers=[CHUNKED], body=b"zz\r\n"),
        400,
    ),
    "a chunk that is longer": (completion_in_chunks(b"5\r\nabcdefgh\r\n0\r\n\r\n"), 400),
}


@pytest.mark.parametrize(("content", "status"), NO_REQUEST.values(), ids=NO_REQUEST)
def test_what_is_no_request_is_answered_once_and_the_connection_closed(content, status, narrow_url):
    # A second request comes behind it: whoever takes the first for another length would answer that too.
    found = ask(narrow_url, content + request(token=TOKEN))
    assert found[0][0] == status
    assert all(status >= 400 for status, _ in found)
    assert error_of(found[0][1])["message"]


def test_bytes_behind_an_early_answer_do_no_harm(narrow_url):
    with connected(narrow_url) as opened:
        opened.sendall(request("/v1/completions", "POST", headers=[CHUNKED]))
        assert read_answer(opened)[0] == 401
        opened.sendall(b"zz\r\n")
        with contextlib.suppress(ConnectionResetError):  # as good: closed
            assert read_to_end(opened) == b""


def test_requests_in_one_packet_are_answered_in_order(narrow_url):
    found = ask(narrow_url, request(token=TOKEN) + completion(TOKEN) + request("/nothing", token=TOKEN, headers=LAST))
    assert [status for status, _ in found] == [200, 200, 404]


def send_until_sent_away(opened, content):
    """Send bytes one by one, until the server says something or closes the connection."""
    opened.settimeout(0.05)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for byte in content:
            opened.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                opened.recv(1)
                return
        raise AssertionError("all was sent")


LONG_HEADER = request(token=TOKEN, headers=["X: " + "a" * 1000])[:-4]  # which does not end: nothing can be answered
SLOW = {  # what comes at once, the status that answers it, and what comes slowly
    "headers": (b"", None, LONG_HEADER),
    "headers after a good request": (request(token=TOKEN), 200, LONG_HEADER),
    "body": (completion(TOKEN, ["Content-Length: 1000"]), None, b"a" * 900),
    "body after an early answer": (completion(None, ["Content-Length: 1000"]), 401, b"a" * 900),
    "chunks": (completion_in_chunks(b""), None, b"1\r\na\r\n" * 200),
    "body that is too large": (completion(TOKEN, ["Content-Length: 9999999999999999999"]), None, b"a" * 1000),
}


@pytest.mark.parametrize(
    ("at_once", "status", "slowly"),
    [
        pytest.param(*values, id=name, marks=[] if name in ("headers", "body", "chunks") else [pytest.mark.slow])
        for name, values in SLOW.items()
    ],
)
def test_slow_requests_are_sent_away(at_once, status, slowly, narrow_url):
    start = time.monotonic()
    with connected(narrow_url) as opened:
        opened.sendall(at_once)
        if status is not None:
            assert read_answer(opened)[0] == status
        send_until_sent_away(opened, slowly)
    assert time.monotonic() - start > CLIENT_TIMEOUT / 2


STOPPED = {"nothing": b"", "half a line": b"GET /v1/mod", "all but a byte": completion(TOKEN)[:-1]}


@pytest.mark.parametrize("content", STOPPED.values(), ids=STOPPED)
def test_who_stops_sending_is_told_why(content, narrow_url):
    start = time.monotonic()
    ((status, body),) = ask(narrow_url, content)
    assert status == 408
    assert f"did not arrive in full within {CLIENT_TIMEOUT:g} s" in error_of(body)["message"]
    assert time.monotonic() - start > CLIENT_TIMEOUT / 2


def test_a_long_answer_is_no_slow_request(narrow_url):
    start = time.monotonic()
    ((status, body),) = ask(narrow_url, completion(TOKEN, LAST, max_tokens=1000))
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 1000
    assert time.monotonic() - start > CLIENT_TIMEOUT  # else the test says nothing


@pytest.mark.parametrize("stream", [True, *slow(False)])
def test_a_long_answer_to_who_asks_for_another_protocol(stream, narrow_url):
    """As Java's clients do, and curl --http2: HTTP/1.1 is what they get, in full."""
    start = time.monotonic()
    headers = ["Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"]
    with connected(narrow_url) as opened:
        opened.sendall(completion(TOKEN, headers, max_tokens=1000, stream=stream))
        received = read_to_end(opened)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.rstrip(b"\r\n0").endswith(b"data: [DONE]" if stream else b"}")
    assert time.monotonic() - start > CLIENT_TIMEOUT  # else the test says nothing


@pytest.mark.slow
def test_a_body_that_comes_after_its_answer_leaves_no_connection_open(narrow_url):
    with connected(narrow_url) as opened:
        opened.sendall(request("/v1/completions", "POST", headers=[JSON, "Content-Length: 2"]))
        assert read_answer(opened)[0] == 401
        opened.sendall(b"{}")
        assert read_to_end(opened) == b""  # closed, as every connection on which nothing comes


def test_a_client_that_reads_nothing_is_cut(endless_model_dir, adapters, caplog):
    # A list of models that no system takes at once stands for a long answer.
    long = f"{'a' * 200_000}={adapters['first']}"
    with serving(endless_model_dir, api_key=TOKEN, adapter=[long]) as url:
        with connected(url, receive_buffer=4096) as opened:
            opened.sendall(request(token=TOKEN) * 100)
            wait_until(lambda: "A connection is cut" in caplog.text)
            assert len(read_to_end(opened)) < 100 * 200_000  # what the system had taken already
        is_idle(url)


@pytest.mark.slow
def test_a_stream_that_nobody_reads_holds_up_nobody(narrow_url, caplog):
    """Megabytes, more than systems keep between two programs."""
    with connected(narrow_url, receive_buffer=4096) as lazy:
        lazy.sendall(completion(TOKEN, max_tokens=1000, n=4, stream=True, logprobs=20) * 10)
        wait_until(lambda: ask(narrow_url, completion(TOKEN, LAST))[0][0] == 200 and "is cut" in caplog.text)
        is_idle(narrow_url)


def test_too_many_connections(endless_model_dir):
    patient = serving(endless_model_dir, api_key=TOKEN, client_timeout=PATIENCE)  # cuts none of those that say nothing
    with patient as url, contextlib.ExitStack() as opened:
        for _ in range(MOST_CONNECTIONS):
            opened.enter_context(connected(url))
        ((status, body),) = ask(url, request("/health"))
        assert status == 503
        assert error_of(body)["code"] == "too_many_connections"
        # Many more are cut without a word, so that their number stays bounded.
        *_, last = [opened.enter_context(connected(url)) for _ in range(2 * MOST_CONNECTIONS)]
        assert read_to_end(last) == b""


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_vanish_at_any_moment_leave_nothing(stream, narrow_url):
    content = completion(TOKEN, max_tokens=900, stream=stream)
    for number in range(30):
        with connected(narrow_url) as opened:
            opened.sendall(content[: len(content) * (number % 5 + 1) // 5])
            if number % 3 == 0 and number % 5 == 4 and stream:
                opened.recv(100)
            elif number % 2:
                time.sleep(0.01)
            vanish(opened)
    is_idle(narrow_url)

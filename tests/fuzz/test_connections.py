"""Bytes sent to a real server, and clients that leave at any moment."""

import logging
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.checking import fuzz, survives
from tests.fuzz.documents import broken

pytest.importorskip("fastapi")
from tests.serving.raw import (
    CHUNKED,
    LAST,
    TOKEN,
    ask,
    completion,
    connected,
    is_idle,
    logged_in_test,
    request,
    serving,
    vanish,
)

STREAM = completion(TOKEN, stream=True, max_tokens=50)
WHOLE = completion(TOKEN, max_tokens=50)
REQUESTS = [
    completion(TOKEN),
    STREAM,
    request(token=TOKEN),
    request("/v1/models/tiny", token=TOKEN, headers=["X-Other: value", "Accept: */*"]),
    request("/health", headers=LAST) * 3,
    request("/v1/completions", "POST", token=TOKEN, headers=[CHUNKED], body=b'5\r\n{"a":\r\n3;x=y\r\n 1}\r\n0\r\n\r\n'),
    completion(TOKEN, ["Expect: 100-continue"]),
]
# What parsers of HTTP have stumbled over.
LINES = ["Content-Length: 3", "Content-Length: 99999", CHUNKED, "Transfer-Encoding: identity", "Connection: close"]
LINES += ["Connection: upgrade\r\nUpgrade: websocket", "Host: other", " folded", "Expect: 100-continue", "X\0: y"]
LINES += [": no name", "A" * 70_000]
ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z ]*\r\n")
KNOWN = {100, 200, 400, 401, 404, 405, 408, 413, 429, 431, 501, 503}


@pytest.fixture(scope="module")
def url(tiny_model_dir):
    with serving(tiny_model_dir, api_key=TOKEN, base_name="tiny", max_connections=64) as url:
        yield url
        is_idle(url)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """No log has a traceback or the token."""
    with caplog.at_level(logging.DEBUG, "mola"), caplog.at_level(logging.DEBUG, "asyncio"):
        yield
    logged = logged_in_test(caplog)
    assert "Traceback" not in logged
    assert TOKEN not in logged


@st.composite
def _with_odd_lines(draw, content):
    head, _, body = content.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    for line in draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=3)):
        lines.insert(draw(st.integers(1, len(lines))), line.encode("latin-1"))
    end = draw(st.sampled_from([b"\r\n"] * 4 + [b"\n", b"\r"]))
    return end.join([*lines, b"", body])


SENT = st.sampled_from(REQUESTS).flatmap(lambda content: _with_odd_lines(content) | broken(content))
SENT |= st.tuples(SENT, st.sampled_from(REQUESTS)).map(b"".join) | st.binary(max_size=200)


def _talk(url, content, cut):
    """What comes back when bytes are sent in two parts, and then no more."""
    received = b""
    with connected(url) as opened:
        try:
            for part in (content[:cut], content[cut:]):
                opened.sendall(part)
            opened.settimeout(0.02)
            while part := opened.recv(1 << 16):
                received += part
        except TimeoutError:
            vanish(opened)
        except (BrokenPipeError, ConnectionResetError):
            pass
    return received


@pytest.fixture(scope="module")
def answered():
    """What came back at all, before patience was at its end."""
    found = []
    yield found
    assert found


@fuzz
@given(content=SENT, cut=st.integers(0, 300))
def test_bytes(url, answered, content, cut):
    received = survives(_talk, url, content, cut)
    if received:
        assert ANSWER.match(received), received
        answered.append(received)
    assert {int(status) for status in ANSWER.findall(received)} <= KNOWN
    assert survives(ask, url, request("/health", headers=LAST))[0][0] == 200


@fuzz
@given(content=st.sampled_from([STREAM, WHOLE]), share=st.floats(0, 1), seconds=st.sampled_from([0, 0, 0.005, 0.03]))
def test_leaving(url, content, share, seconds):
    with connected(url) as opened:
        opened.sendall(content[: round(share * len(content))])
        time.sleep(seconds)
        vanish(opened)

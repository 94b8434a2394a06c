"""Clients that send bytes of their own, as no library would, and a server with narrow limits for them."""

import json
import re
import socket
import struct
from contextlib import contextmanager
from urllib.parse import urlsplit

from mola.serving.serve import ServeOptions, running_server

from ..waiting import PATIENCE, wait_until

TOKEN = "a-secret-token"
SECRET = "my-secret-prompt"
CLIENT_TIMEOUT = 0.6
MOST_CONNECTIONS = 12
LAST = ["Connection: close"]  # the server closes the connection after its answer
JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"


def serving(folder, **fields):
    """A server for a `with` block, which gives its address."""
    limits = {
        "max_connections": MOST_CONNECTIONS,
        "max_waiting": MOST_CONNECTIONS - 1,
        "client_timeout": CLIENT_TIMEOUT,
    }
    options = ServeOptions(base_model=str(folder), port=0, dtype="float32", device="cpu", **(limits | fields))
    return running_server(options)


def request(path="/v1/models", method="GET", *, token=None, host="127.0.0.1", headers=(), body=b"", version="1.1"):
    """Bytes of a request; with a body also its length, unless a header has one."""
    lines = [f"{method} {path} HTTP/{version}", f"Host: {host}"]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    lines += headers
    if body and not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def completion(token=None, headers=(), **fields):
    """Bytes of a request for a completion."""
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2} | fields).encode()
    return request(
        "/v1/completions", "POST", token=token, headers=["Content-Type: application/json", *headers], body=body
    )


@contextmanager
def connected(url, receive_buffer=None):
    """A connection to the server at `url`."""
    with socket.socket() as opened:
        if receive_buffer is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        opened.settimeout(PATIENCE)
        address = urlsplit(url)
        opened.connect((address.hostname, address.port))
        yield opened


def read_to_end(opened):
    """All bytes until the server closes the connection; one that it leaves open is a TimeoutError."""
    received = b""
    while part := opened.recv(1 << 16):
        received += part
    return received


def read_answer(opened):
    """Status and body of the next answer; what comes behind it in the same packet is lost."""
    received = b""
    while (found := _first_answer(received)) is None:
        part = opened.recv(1 << 16)
        assert part, received
        received += part
    return found[:2]


def answers(received):
    """Status and body of every answer in some bytes, all with their length."""
    found = []
    while received:
        answer = _first_answer(received)
        assert answer is not None, received
        *status_and_body, received = answer
        found.append(tuple(status_and_body))
    return found


def _first_answer(received):
    """Status, body and what follows; None if it is not all there."""
    head, separator, rest = received.partition(b"\r\n\r\n")
    if not separator:
        return None
    status = int(re.match(rb"HTTP/1\.1 (\d{3}) ", head)[1])
    length = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1])
    return (status, rest[:length], rest[length:]) if len(rest) >= length else None


def ask(url, *parts):
    """Send bytes, and read until the server closes the connection: status and body of every answer."""
    with connected(url) as opened:
        for part in parts:
            opened.sendall(part)
        return answers(read_to_end(opened))


def error_of(body):
    """The error in an answer's body, which has OpenAI's form."""
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def vanish(opened):
    """Close without a word, as when a cable is pulled: the server's next packet is answered with a reset."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    opened.close()


def logged_in_test(caplog):
    """What was logged in the test and after it, tracebacks too: behind a `yield` `caplog.text` has the latter alone."""
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    return "\n".join(map(caplog.handler.format, records))


def is_idle(url):
    """Wait until the server holds no request; then it answers one."""
    wait_until(lambda: _health(url) == {"status": "ok", "running": 0, "waiting": 0})
    assert ask(url, completion(TOKEN, LAST))[0][0] == 200


def _health(url):
    try:
        status, body = ask(url, request("/health", headers=LAST))[0]
    except ConnectionResetError as error:  # connections of clients that have left are still being closed
        return error
    return json.loads(body) if status == 200 else status

"""Paths of raw requests that try to get past the guarded routes of a server; clients of HTTP clean such paths up."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")

from mola.serving.serve import ServeOptions, running_server  # noqa: E402

from ..waiting import PATIENCE  # noqa: E402
from .proxies import running_proxy  # noqa: E402
from .skills_folders import FOLDER  # noqa: E402

# Statuses without `--adapter_root`: 403 is the guarded route itself, which refuses.
HOSTILE = [
    ("POST", "/v1/load_lora_adapter", 403),
    ("POST", "/x/../v1/load_lora_adapter", 404),
    ("POST", "/v1/../v1/load_lora_adapter", 404),
    ("POST", "/v1/./load_lora_adapter", 404),
    ("POST", "/./v1/load_lora_adapter", 404),
    ("POST", "/v1/models/../load_lora_adapter", 405),
    ("POST", "/health/../v1/load_lora_adapter", 404),
    ("POST", "/%2e%2e/v1/load_lora_adapter", 404),
    ("POST", "/x/%2e%2e/v1/load_lora_adapter", 404),
    ("POST", "/x/.%2E/v1/load_lora_adapter", 404),
    ("POST", "/x/%252e%252e/v1/load_lora_adapter", 404),
    ("POST", "/v1%2fload_lora_adapter", 403),
    ("POST", "/v1/load_lora_adapte%72", 403),
    ("POST", "/v1/load%5flora_adapter", 403),
    ("POST", "/v1%252fload_lora_adapter", 404),
    ("POST", "/v1/load_lora_adapter/", 404),
    ("POST", "/v1/load_lora_adapter/.", 404),
    ("POST", "/v1/load_lora_adapter;x", 404),
    ("POST", "/v1/load_lora_adapter%00", 404),
    ("POST", "/v1/load_lora_adapter%20", 404),
    ("POST", "/V1/load_lora_adapter", 404),
    ("POST", "//v1/load_lora_adapter", 404),
    ("POST", "/v1//load_lora_adapter", 404),
    ("POST", "//vllm/v1/load_lora_adapter", 404),
    ("POST", "http://vllm/v1/load_lora_adapter", 404),
    ("POST", "/\\v1/load_lora_adapter", 404),
    ("POST", "/x\\..\\v1/load_lora_adapter", 404),
    ("POST", "/?/../v1/load_lora_adapter", 404),
    ("POST", "/x/../v1/unload_lora_adapter", 404),
    ("PUT", "/v1/load_lora_adapter", 405),
    ("GET", "/v1/load_lora_adapter", 405),
    ("GET", "//", 404),
    ("GET", "/", 404),
    ("POST", "/health", 405),
    ("DELETE", "/v1/models/numbers", 405),
    ("POST", "/collective_rpc", 404),
    ("POST", "/sleep", 404),
    ("POST", "/reset_prefix_cache", 404),
    ("POST", "/invocations", 404),
    ("GET", "/server_info", 404),
]
SAFE = ["/health", "/metrics"]  # what the proxy may ask of the server behind in these tests


@pytest.fixture(scope="module")
def behind():
    """A server that answers every request; `paths` has the path of each, as it arrives."""

    class Recorder(BaseHTTPRequestHandler):
        paths: list[str] = []

        def answer(self):
            self.paths.append(self.path)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", Recorder.paths
        server.shutdown()


@pytest.fixture(scope="module")
def ports(behind, skills_root, chat_model_dir):
    """Ports of the proxy in front of the recorder, and of mola's own server."""
    folder = skills_root / FOLDER
    own = ServeOptions(base_model=str(chat_model_dir), adapter=[str(folder)], dtype="float32", device="cpu", port=0)
    with running_proxy(behind[0], folder, chat_model_dir) as proxy, running_server(own) as url:
        yield {"proxy": httpx.URL(proxy).port, "own": httpx.URL(url).port}


def send(port, method, target):
    """Status and body of a request whose target is sent as it is."""
    body = json.dumps({"lora_name": "numbers", "lora_path": "/etc"})
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        connection.sendall(f"{head}{body}".encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("server", ["proxy", "own"])
@pytest.mark.parametrize(("method", "target", "status"), HOSTILE)
def test_hostile_paths_are_refused_and_reach_no_server_behind(method, target, status, server, ports, behind):
    behind[1].clear()
    answered, body = send(ports[server], method, target)
    assert behind[1] == []
    assert answered == status
    assert json.loads(body)["error"]["message"]


def test_known_paths_reach_the_server_behind(ports, behind):
    behind[1].clear()
    for path in SAFE:
        assert send(ports["proxy"], "GET", f"{path}?x=/../v1/load_lora_adapter")[0] == 200
    assert behind[1] == SAFE

"""The command in a process of its own, while many clients that mean no good hold on to it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from ..waiting import PATIENCE, wait_until
from .raw import LAST, TOKEN, ask, connected, is_idle, request

NUM_CLIENTS = 300
LIMITS = ["--max_connections", "100", "--max_waiting", "50", "--client_timeout", "2"]


@contextlib.contextmanager
def command(folder, most_files, log):
    """Process and address of `mola serve`; its end is checked."""
    words = [sys.executable, "-m", "mola.cli", "serve", "--base_model", str(folder), "--port", "0", *LIMITS]
    limited = ["sh", "-c", f'ulimit -n {most_files}; exec "$@"', "sh", *words]
    environment = os.environ | {"MOLA_API_KEY": TOKEN, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file, subprocess.Popen(limited, env=environment, stderr=file) as server:
        try:
            yield server, wait_until(lambda: re.search(r"http://\S+", log.read_text()), server)[0]
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()


def resident(server):
    """MiB of memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1]) / 1024


def hold_on(url, seconds):
    """Keep half requests open, and open another for every one that is cut; how many that were."""
    with contextlib.ExitStack() as stack:
        clients, opened, end = [], 0, time.monotonic() + seconds
        while time.monotonic() < end:
            while len(clients) < NUM_CLIENTS:
                clients.append(stack.enter_context(connected(url)))
                clients[-1].settimeout(0)
                opened += 1
            clients = [client for client in clients if is_held(client)]
            time.sleep(0.05)
    return opened


def is_held(client):
    """Send one byte more; whether the server lets that be."""
    try:
        client.send(b"a")
        client.recv(1 << 16)
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    client.close()
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory in /proc, which is Linux's")
@pytest.mark.parametrize("most_files", [1024, 64])
def test_the_server_outlives_a_swarm(most_files, endless_model_dir, tmp_path):
    log = tmp_path / "log"
    with command(endless_model_dir, most_files, log) as (server, url):
        is_idle(url)
        before = resident(server)
        opened = hold_on(url, seconds=8)
        grown = resident(server) - before
        start = time.monotonic()
        is_idle(url)  # without free files connections are accepted once a second
        print(f"{opened} connections, {grown:.1f} MiB more, an answer after {time.monotonic() - start:.2f} s")
        assert opened > NUM_CLIENTS
        assert grown < 50
        assert ask(url, request(token=TOKEN, headers=LAST))[0][0] == 200
    assert TOKEN not in log.read_text()
    assert ("Traceback" in log.read_text()) == (most_files < 100)  # asyncio's, of a connection it has no file for

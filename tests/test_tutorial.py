"""The tutorial's commands, in their order, with the tiny model in place of its model."""

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mola.cli import main
from tests.docs_blocks import blocks, write_files
from tests.ports import free_port
from tests.waiting import PATIENCE, wait_until

PAGE = Path(__file__).resolve().parents[1] / "docs" / "get-started" / "tutorial.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def commands(tmp_path, monkeypatch, tiny_model_dir):
    """The words of each line of the page's bash blocks, with the tiny model."""
    monkeypatch.chdir(tmp_path)
    write_files(PAGE, tmp_path)
    lines = [line for block in blocks(PAGE) if block.kind == "bash" for line in block.text.splitlines() if line]
    return [shlex.split(line.replace(MODEL, str(tiny_model_dir))) for line in lines]


@pytest.mark.filterwarnings("default")
def test_the_tutorial_runs_from_chats_to_an_answer_by_http(commands, tmp_path, caplog):
    caplog.set_level("INFO")
    names = [words[1] if words[0] == "mola" else words[0] for words in commands]
    install, steps = names[:3], names[3:]
    assert install == ["python3", "source", "pip"]
    assert steps == ["python", "train", "generate", "report", "serve", "curl", "compare"]
    make_chats, *in_process, serve, curl, compare = commands[len(install) :]
    subprocess.run([sys.executable, *make_chats[1:]], check=True)
    assert len((tmp_path / "chats.jsonl").read_text(encoding="utf-8").splitlines()) == 60
    for words in [*in_process, compare]:
        few = ["--max_steps", "2", "--warmup_steps", "0", "--dtype", "float32", "--disable_tqdm", "true"]
        assert main([*words[1:], *(few if words[1] in ("train", "compare") else [])]) == 0
    assert "60 conversations, 1.0 turns each" in caplog.text
    assert (tmp_path / "runs" / "chats" / "report.html").is_file()

    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [word.replace("8000", port) for word in serve[1:]]
    server = subprocess.Popen([sys.executable, "-m", "mola.cli", *words, "--dtype", "float32"], env=environment)
    try:
        url = curl[1].replace("8000", port)
        header, _, value = curl[curl.index("-H") + 1].partition(": ")
        request = urllib.request.Request(url, curl[curl.index("-d") + 1].encode(), {header: value})
        wait_until(lambda: _answers(url), server)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            answer = json.load(response)
        assert answer["model"] == "chats"
        assert answer["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(PATIENCE)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url.replace("/v1/chat/completions", "/health"), timeout=PATIENCE):
            return True
    except OSError:
        return False

"""Transformers' own server with a mixture, as docs/guides/serving.md has it."""

import shutil
import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `test`")
openai = pytest.importorskip("openai", reason="needs the extra `test`")

from tests.ports import free_port  # noqa: E402
from tests.waiting import PATIENCE, wait_until  # noqa: E402

pytestmark = pytest.mark.slow
PROGRAM = """
import mola
from transformers.cli.transformers import main

if __name__ == "__main__":
    main()
"""


def is_up(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).status_code == 200
    except httpx.TransportError:
        return False


def test_it_answers_as_mola_does(chat_model_dir, adapters, offline, tmp_path):
    served, port = tmp_path / "served", free_port()
    shutil.copytree(chat_model_dir, served)
    for path in adapters["first"].glob("adapter_*"):
        shutil.copy(path, served)
    program = tmp_path / "serve_mola.py"
    program.write_text(PROGRAM, encoding="utf-8")
    words = [str(program), "serve", str(served), "--port", str(port), "--dtype", "float32", "--device", "cpu"]
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: is_up(port), process)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE)
            asked = {"model": str(served), "max_tokens": 4, "temperature": 0}
            messages = [{"role": "user", "content": "Hello"}]
            answer = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)
    expected = offline("first", "<s><user>Hello<assistant>")
    assert answer.strip() == expected.strip()
    assert expected.strip() != offline("tiny-chat", "<s><user>Hello<assistant>").strip()

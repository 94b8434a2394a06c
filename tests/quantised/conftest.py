"""Models whose linears have whole blocks of 64 inputs, and the package that packs them."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mola.data.prepare import PrepareOptions, prepare
from tests.conftest import build_byte_tokenizer


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mola-peft[quant]'")


@pytest.fixture(scope="session")
def blocks_dir(tmp_path_factory):
    """Folder with a random 4-layer LLaMA, 64 wide, and its tokenizer: bitsandbytes may repack it on a CPU."""
    folder = tmp_path_factory.mktemp("blocks-llama")
    tokenizer = build_byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def no_weights(blocks_dir, tmp_path_factory):
    """The same without weights: whoever tries to load them fails."""
    folder = tmp_path_factory.mktemp("no-weights") / "model"
    shutil.copytree(blocks_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Folder with a few prepared questions."""
    folder = tmp_path_factory.mktemp("sample")
    prepare(PrepareOptions("sample", str(folder), train_size=12, validation_size=4, test_size=4))
    return folder

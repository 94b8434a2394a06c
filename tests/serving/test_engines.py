"""How much memory there is for keys and values."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from mola.serving.engines import room_of_containers
from mola.serving.writing import special_tokens


def test_a_container_has_what_its_limit_leaves(tmp_path):
    def files(name, limit, used):
        pair = tmp_path / f"{name}.max", tmp_path / f"{name}.current"
        for path, text in zip(pair, (limit, used), strict=True):
            path.write_text(f"{text}\n", encoding="utf-8")
        return tuple(map(str, pair))

    pairs = [files("a", 1000, 300), files("b", "max", 5), files("c", 10, 30), ("none", "none")]
    assert room_of_containers(pairs) == [700, 0]


def test_a_tokenizer_whose_added_tokens_are_a_method_has_special_ones(tiny_tokenizer):
    """As mistral-common's, which raises when it is called."""

    class Tokenizer:
        all_special_tokens, all_special_ids = tiny_tokenizer.all_special_tokens, tiny_tokenizer.all_special_ids

        def added_tokens_decoder(self):
            raise NotImplementedError

    assert special_tokens(Tokenizer()) == dict(
        zip(tiny_tokenizer.all_special_tokens, tiny_tokenizer.all_special_ids, strict=True)
    )

"""How much memory there is for keys and values."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from mola.serving.engine_choice import free_memory_of_container


def test_free_memory_of_a_container_is_what_its_limit_leaves(tmp_path):
    def files(name, limit, used):
        pair = tmp_path / f"{name}.max", tmp_path / f"{name}.current"
        for path, text in zip(pair, (limit, used), strict=True):
            path.write_text(f"{text}\n", encoding="utf-8")
        return tuple(map(str, pair))

    pairs = [files("a", 1000, 300), files("b", "max", 5), files("c", 10, 30), ("none", "none")]
    assert free_memory_of_container(pairs) == [700, 0]

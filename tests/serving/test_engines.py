"""How much memory there is for keys and values."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from mola.serving.engines import room_of_containers


def test_a_container_has_what_its_limit_leaves(tmp_path):
    def files(name, limit, used):
        pair = tmp_path / f"{name}.max", tmp_path / f"{name}.current"
        for path, text in zip(pair, (limit, used), strict=True):
            path.write_text(f"{text}\n", encoding="utf-8")
        return tuple(map(str, pair))

    pairs = [files("a", 1000, 300), files("b", "max", 5), files("c", 10, 30), ("none", "none")]
    assert room_of_containers(pairs) == [700, 0]

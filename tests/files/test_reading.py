"""Text, JSON and YAML that anybody may have written."""

import json

import pytest

from mola import MolaError
from mola.files.reading import json_lines, parse_json, parse_yaml, read_text


@pytest.mark.parametrize(
    "text", ['"\\ud83d\\ude00"', '"\\\\ud83d"', '"\\\\\\ud83d\\ude00"', '{"é": [1, null]}', '[1e5, "x"]']
)
def test_json_of_whole_characters(text):
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    "text", ['"\\ud83d"', '"\\ude00"', '"\\\\\\ud83d"', '{"\\uDE00\\ud83d": 1}', "[" * 10**5, "", "{"]
)
def test_json_that_is_refused(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_half_characters_on_request():
    assert parse_json('"\\ud83d"', half_characters=True) == "\ud83d"


def test_yaml_references_that_stay_small():
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: *x}}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    "text", ["&z [*z]", "2024-13-45", '!!int ""', "[" * 101, "!!python/name:os.system x", '"\\ud800"']
)
def test_yaml_that_is_refused(text):
    with pytest.raises(ValueError):
        parse_yaml(text)


def test_no_regular_file(tmp_path):
    with pytest.raises(OSError, match="directory"):
        read_text(tmp_path)
    with pytest.raises(OSError, match="no regular file"):
        read_text("/dev/null")


def test_json_lines_leave_out_half_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    assert list(json_lines(path)) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(json_lines(path)) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(MolaError, match="line 2"):
        list(json_lines(path))

"""JSON lines and YAML."""

import pytest

from mola import MolaError
from mola.files.reading import parse_yaml, read_json_lines, read_json_object, select_lines


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, text) for text in ("no", "off", "2020-01-01", "12:30", "010", "1.2.3")),
        *[("true", True), ("'true'", "true"), ("2468", 2468), ("-3", -3), ("1.5", 1.5)],
        *[("1e-4", 1e-4), ("3.5e-4", 3.5e-4), ("null", None), ("", None)],
    ],
)
def test_yaml_words_and_numbers(text, value):
    read = parse_yaml(f"key: {text}")["key"]
    assert (read, type(read)) == (value, type(value))


def test_yaml_references():
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: *x}}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


@pytest.mark.parametrize("text", ["a: [1", "!!python/name:os.system x", "a: 1\na: 2", "b: {a: 1, 'a': 2}", "*nothing"])
def test_yaml_that_is_refused(text):
    with pytest.raises(ValueError):
        parse_yaml(text)


def test_json_lines_leave_out_an_incomplete_last_line(tmp_path):
    path = tmp_path / "a.jsonl"
    assert list(read_json_lines(path)) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(read_json_lines(path)) == [{"a": 1}, {"a": 2}]
    assert select_lines(path, lambda entry: entry["a"] > 1) == ['{"a": 2}']
    path.write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(MolaError, match="line 2"):
        list(read_json_lines(path))


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_missing_or_wrong_object_is_empty(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert read_json_object(tmp_path / "a.json") == {}
